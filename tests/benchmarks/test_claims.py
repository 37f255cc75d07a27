"""The claims page says what the figures say, and a claim that the figures refute is called refuted."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.claims.page import Results, interval, write_page
from benchmarks.claims.partitions import written
from benchmarks.claims.train import EPOCHS, bounded_sequences, grid, missing, read
from benchmarks.claims.variants import VARIANTS
from etl.warehouse.schemas import SEQUENCES

RESULTS = Path(__file__).parents[2] / "benchmarks/results/claims"


def verdict(page: Path, claim: str) -> str:
    rows = re.findall(r"<tr><td>(.*?)</td><td>.*?</td><td class=\"\w+\">(.*?)</td></tr>", page.read_text())
    (found,) = [said for title, said in rows if title.startswith(claim)]
    return found


def changed(tmp_path: Path, change) -> Path:
    """Render the page from the measured results after `change` of each training (None: as if it had not been run)."""
    results = tmp_path / "results"
    results.mkdir()
    runs = [after for run in read(RESULTS / "trainings.jsonl") if (after := change(dict(run)))]
    (results / "trainings.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    for name in ("latency.json", "memory.json"):
        (results / name).write_text((RESULTS / name).read_text())
    return write_page(results, tmp_path / "page")


def test_the_page_stands_alone_and_holds_every_section_and_five_runs_of_every_model(tmp_path):
    page = changed(tmp_path, lambda run: run).read_text()
    assert "<script" not in page and "https://" not in re.sub(r"http://www\.w3\.org\S*|xmlns\S*", "", page)
    assert page.count("<figure>") == 5 and page.count("<section>") == 9
    found = Results(RESULTS)
    short = [
        (data_set, name)
        for name in VARIANTS
        for data_set in EPOCHS
        if VARIANTS[name].runs_on(data_set) and len(found.runs(data_set, name)) < 5
    ]
    assert short == []


@pytest.mark.parametrize("variants", [("vql", "mean_pooling"), ("exact",), ("vql_missing_50",), ("vql_16_codes",), ()])
def test_a_page_of_some_variants_says_what_was_not_measured(tmp_path, variants):
    page = changed(tmp_path, lambda run: run if run["variant"] in variants and run["number"] == 0 else None).read_text()
    assert page.count("<section>") == 9 and ">None<" not in page and "not measured" in page


def test_a_refuted_claim_is_told_as_refuted(tmp_path):
    def worse(run):
        if run["data_set"] == "simulated" and run["variant"] in ("vql", "vql_refined_64"):
            run["auc"] -= 0.05
        for row in run.get("by_length", []):
            row["holds"] = False
        return run

    page = changed(tmp_path, worse)
    assert verdict(page, "Plain VQL is within") == "fails"
    assert verdict(page, "Refined VQL is within") == "fails"
    assert verdict(page, "The bound of the theorem") == "fails"
    assert verdict(page, "VQL beats recent 200") == "fails"


def test_noise_is_told_as_noise(tmp_path):
    def noisy(run):
        if run["data_set"] == "simulated" and run["variant"] == "sdim":
            run["auc"] = 0.783 + 0.05 * (-1) ** run["number"]
        return run

    assert verdict(changed(tmp_path, noisy), "VQL beats SDIM") == "not decided"


def test_an_interval_is_students():
    difference = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert difference.mean == 3 and difference.half == pytest.approx(2.776 * 1.5811 / 5**0.5, rel=1e-3)
    assert difference.above and not difference.below and not interval([1.0]).above


def test_a_grid_pairs_seeds_with_simulated_partitions():
    runs = grid(["simulated", "movielens"], Path("x"), 2, ("exact", "vql_ema"))
    assert [(run.data_set, str(run.folder), run.variant, run.number) for run in runs] == [
        ("simulated", "x/simulated_0", "exact", 0),
        ("simulated", "x/simulated_0", "vql_ema", 0),
        ("simulated", "x/simulated_1", "exact", 1),
        ("simulated", "x/simulated_1", "vql_ema", 1),
        ("movielens", "x/movielens", "exact", 0),
        ("movielens", "x/movielens", "exact", 1),
    ]


def test_what_is_measured_is_not_measured_again(tmp_path):
    runs = grid(list(EPOCHS), tmp_path, 5, tuple(VARIANTS))
    assert len(runs) > 500 and missing(runs, RESULTS / "trainings.jsonl") == []
    (tmp_path / "some.jsonl").write_text(json.dumps({"data_set": "simulated", "variant": "vql", "number": 3}))
    assert len(missing(runs, tmp_path / "some.jsonl")) == len(runs) - 1


def test_a_target_sees_no_more_than_the_pipeline_would_show_it(tmp_path):
    rows = pa.table(
        {
            name: [value]
            for name, value in {
                "user_id": 1,
                "user_fields": ["a"],
                "history_item_index": [0, 1, 2],
                "history_time_ms": [1, 2, 3],
                "history_feedback": [0, 0, 0],
                "history_watch_bucket": [0, 0, 0],
                "target_item_index": [1, 2],
                "target_time_ms": [2, 4],
                "target_label": [0, 1],
                "target_context": [0, 0],
                "target_is_random": [False, False],
                "target_split": [0, 2],
                "target_history_end": [1, 3],
            }.items()
        },
        schema=SEQUENCES,
    )
    folder = written(tmp_path / "set", pa.table({"item_index": [0]}), rows, 2)
    assert bounded_sequences(folder / "sequences.parquet").target_first.tolist() == [0, 1]
    pq.write_table(rows, folder / "sequences.parquet")
    with pytest.raises(ValueError, match="run the step prepare again"):
        bounded_sequences(folder / "sequences.parquet")


@pytest.mark.slow
def test_the_whole_report_from_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.claims",
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path / "results"),
        "--sets",
        "simulated",
        "--variants",
        "vql,mean_pooling",
        "--seeds",
        "1",
        "--steps",
        "prepare,train,page",
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
    }  # threads that wait for each other on a busy machine took ten times as long
    subprocess.run(command, check=True, env=env)
    runs = read(tmp_path / "results/trainings.jsonl")
    auc = {run["variant"]: run["auc"] for run in runs}
    assert auc.keys() == {"vql", "mean_pooling"}
    assert auc["vql"] > auc["mean_pooling"]
    subprocess.run(command, check=True, env=env)  # nothing left to train
    assert len(read(tmp_path / "results/trainings.jsonl")) == 2
