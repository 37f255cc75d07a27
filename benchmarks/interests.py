"""Train every kind of interest on the same partitions, with several seeds, and say how they compare.

    python -m benchmarks.interests --partition FOLDER [--partition FOLDER ...] --models vql,softmax_attention --seeds 5 --device cuda

A folder holds items.parquet and sequences.parquet of one partition (`--make N` writes N simulated ones, another seed each,
through the ETL's own functions, without Spark). One line of progress a model, a table, and one JSON line last. Needs neither
Ray, MLflow nor Spark, so that it also runs where there is a GPU and nothing else.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from evaluation.metrics import auc
from training.config import ModelConfig, TrainConfig
from training.data import Sequences, UserBatches
from training.loop import TrainingData, Worker, train_model

MODELS: dict[str, ModelConfig] = {
    "softmax_attention": ModelConfig(interest="softmax_attention"),
    "vql": ModelConfig(),
    "vql_refined_16": ModelConfig(refine_k=16),
    "vql_refined_64": ModelConfig(refine_k=64),
    "vql_recent_50": ModelConfig(recent_window=50),
    "vql_ema": ModelConfig(ema_decay=0.99),
    "vql_16_codes": ModelConfig(codes=16),
    "vql_256_codes": ModelConfig(codes=256),
    "vql_1_group": ModelConfig(groups=1),
    "vql_2_groups": ModelConfig(groups=2),
    "vql_1_group_256_codes": ModelConfig(groups=1, codes=256),
    "vql_no_kernel": ModelConfig(kernel_components=0),
    "vql_1_exponential": ModelConfig(kernel_components=1),
    "vql_loss_weight_1": ModelConfig(codebook_weight=1.0),
    "vql_loss_weight_001": ModelConfig(codebook_weight=0.01),
    "recent_attention_200": ModelConfig(interest="recent_attention", recent_window=200),
    "sdim": ModelConfig(interest="sdim"),
    "mean_pooling": ModelConfig(interest="mean_pooling"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partition", action="append", default=[], type=Path, help="folder with items.parquet and sequences.parquet")
    parser.add_argument("--make", type=int, default=0, help="first write so many simulated partitions below --out")
    parser.add_argument("--out", type=Path, default=Path("var/interests"))
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma list of: {', '.join(MODELS)}")
    parser.add_argument("--seeds", type=int, default=1, help="training seeds of each partition")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    partitions = [*args.partition, *[make_partition(args.out / f"simulated_{seed}", seed) for seed in range(args.make)]]
    found: dict[str, list[dict]] = {}
    for folder in partitions:
        for seed in range(args.seeds):
            for name in args.models.split(","):
                result = run(folder, name, seed, args.epochs, args.device)
                found.setdefault(name, []).append(result)
                print(f"{folder.name} seed {seed} {name:<22} AUC {result['auc']:.4f}  log loss {result['logloss']:.4f}  {result['seconds']:.0f} s", flush=True)
    print(table(found))
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
    print(json.dumps({"benchmark": "interests", "device": machine, "partitions": [p.name for p in partitions], "models": found}))


def run(folder: Path, name: str, seed: int, epochs: int, device: str) -> dict:
    """Train one model on one partition; return its figures on the evaluation targets."""
    items, sequences = pq.read_table(folder / "items.parquet"), Sequences.from_arrow(pq.read_table(folder / "sequences.parquet"))
    config = TrainConfig(models={name: MODELS[name]}, epochs=epochs, seed=seed)
    data = TrainingData.of(sequences, items, config)
    began = time.perf_counter()
    model, result = train_model(name, data, config, Worker(device=device), lambda _: None)
    seconds = time.perf_counter() - began
    batches = UserBatches(data.joined, 0, 1, users_per_step=32, seed=0)
    with torch.no_grad():
        logit = torch.cat([model(batch.to(device))[0].float().cpu() for batch in batches.all_of(data.split.evaluation)])
    label = torch.from_numpy(sequences.target_label[data.split.evaluation].astype(np.float32))
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logit, label)
    figures = {"partition": folder.name, "seed": seed, "auc": auc(label.numpy(), logit.numpy()), "logloss": float(loss), "seconds": seconds,
               "best_epoch": result.best_epoch + 1, "epochs": result.epoch + 1}
    return figures | {key: value for key, value in result.metrics.items() if key.startswith(("perplexity", "dead", "probe"))}


def table(found: dict[str, list[dict]]) -> str:
    """Return means over all runs, and the paired difference to exact attention with its 95 % interval over runs."""
    base = np.array([r["auc"] for r in found.get("softmax_attention", [])])
    lines = [f"{'model':<24}{'AUC':>8}{'sd':>8}{'log loss':>10}{'minus exact':>13}{'95 % interval':>20}{'perplexity':>12}{'seconds':>9}"]
    for name, runs in found.items():
        values = np.array([r["auc"] for r in runs])
        difference = ""
        if len(base) == len(values) and len(values) > 1:
            delta = values - base
            half = STUDENT_T.get(len(delta) - 1, 1.96) * delta.std(ddof=1) / np.sqrt(len(delta))
            difference = f"{delta.mean():>+13.4f}{f'{delta.mean() - half:+.4f} .. {delta.mean() + half:+.4f}':>20}"
        perplexity = np.mean([r.get("perplexity_share", np.nan) for r in runs])
        lines.append(f"{name:<24}{values.mean():>8.4f}{values.std(ddof=1) if len(values) > 1 else 0:>8.4f}{np.mean([r['logloss'] for r in runs]):>10.4f}"
                     f"{difference:>33}{perplexity:>12.2f}{np.mean([r['seconds'] for r in runs]):>9.0f}")
    return "\n".join(lines)


STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


def make_partition(folder: Path, seed: int) -> Path:
    """Write a simulated partition of KuaiRand's layout, through the functions that the jobs call."""
    if (folder / "sequences.parquet").exists():
        return folder
    from etl.datasets import dataset
    from etl.items import counted, item_rows, merged
    from etl.jobs.events import EVENT, events_schema, parse_split, write_day_bucket
    from etl.partitions import MS_PER_DAY, Window, day_number, days_between
    from etl.raw import RawLocation, read_features
    from etl.sequences import sequence_rows
    from etl.simulate import Simulation, write_simulation
    from etl.store import DataFile, TableStore

    definition, dt = dataset("kuairand_simulated"), "2022-04-21"
    window = Window(dt, 14, 14)
    with tempfile.TemporaryDirectory() as work:
        write_simulation(Simulation(seed=seed), Path(work) / "raw")
        place, store = RawLocation(f"{work}/raw"), TableStore(f"{work}/w", definition.name)
        days = frozenset(day_number(day) for day in days_between("2022-04-08", dt))
        splits = place.splits(place.logs(definition), definition.logs, lambda ranges: [place.count_newlines(*r) for r in ranges])
        rows = pa.concat_tables([t for split in splits for t in parse_split(place, split, definition, days, dt, 1)])
        rows = rows.filter(pa.array(rows["kind"].to_numpy() == EVENT))
        results = [write_day_bucket(rows.filter(pa.array(rows["day"].to_numpy() == day)), store, definition, "a", day, 0) for day in sorted(days)]
        events = store.read_files([DataFile(**r["events_file"]) for r in results]).select(events_schema(definition).names)
        counts = merged([counted(events, day_number(window.first_evaluation_dt) * MS_PER_DAY, definition.events.item_fields)])
        items = item_rows(counts, [read_features(place, rule) for rule in definition.items], definition)
        users = read_features(place, definition.users[0])
        assert users is not None
        columns = [users[rule.column].to_pylist() for rule in definition.users[0].fields.values()]
        fields = {int(user): list(values) for user, values in zip(users["user_id"].to_pylist(), zip(*columns, strict=True), strict=True)}
        sequences, _ = sequence_rows(events, items["item_id"].to_numpy(), counts[""]["occurrences"].to_numpy(), fields, window, definition)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(items, folder / "items.parquet", compression="zstd")
    pq.write_table(sequences, folder / "sequences.parquet", compression="zstd")
    return folder


if __name__ == "__main__":
    main()
