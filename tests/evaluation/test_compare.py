"""Several models on one partition: what is there is not trained again, and the figures are those of a scorer."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from etl.stage.errors import StageError, TryAgainError
from etl.stage.identity import RUN_URL_VARIABLE
from etl.warehouse.schemas import EVALUATION
from etl.warehouse.store import TableStore
from evaluation import compare, trials
from evaluation.compare import exposures_table, slices_table, summaries, table
from evaluation.log_comparison import training_name
from evaluation.metrics import LEAST_USERS, auc
from evaluation.trials import RESAMPLES, Trial, model_config, read, trials_of
from tests.evaluation.conftest import DATASET, DT
from tests.processes import free_port
from tests.test_arrows import ROOT
from training.config import ModelConfig
from training.model.interests import INTERESTS
from training.scoring import ScoredTargets
from training.tracking import NAME_TAG, NOTE_TAG, runs_below


def run(stages, out, monkeypatch, capsys, models: str, *more: str) -> tuple[str, dict]:
    """Compare as the command line does; return what it said, and its last line."""
    words = ["--dataset", DATASET, "--warehouse", str(stages.warehouse), "--dt", DT, "--config", "tiny"]
    monkeypatch.setattr(sys, "argv", ["compare", *words, "--models", models, "--out", str(out), *more])
    compare.main()
    said = capsys.readouterr().out
    last = said.splitlines()[-1:]
    return said, json.loads(last[0]) if last and last[0].startswith("{") else {}


def test_what_is_there_is_not_trained_again_and_more_can_be_added(stages, tmp_path, monkeypatch, capsys):
    out, asked = tmp_path / "out", ["--lengths", "3,8", "--seeds", "1"]
    said, found = run(stages, out, monkeypatch, capsys, "mean_pooling,din", *asked)
    assert "4 trainings, 0 of them" in said
    assert {(entry["model"], entry["length"], entry["seeds"]) for entry in found["models"]} == {
        (model, length, 1) for model in ("mean_pooling", "din") for length in (3, 8)
    }
    results = (out / "results.jsonl").read_text()
    said, again = run(stages, out, monkeypatch, capsys, "mean_pooling,din", *asked)
    assert "4 trainings, 4 of them" in said and again == found
    assert (out / "results.jsonl").read_text() == results
    # A killed call left half a line: that training alone is done again, to the same figures.
    (out / "results.jsonl").write_text(results[: len(results) - 40])
    said, again = run(stages, out, monkeypatch, capsys, "mean_pooling,din", *asked)
    assert "4 trainings, 3 of them" in said
    auc_of = lambda entries: {(e["model"], e["length"]): e["auc"] for e in entries}  # noqa: E731
    assert auc_of(again["models"]) == auc_of(found["models"])
    said, more = run(stages, out, monkeypatch, capsys, "mean_pooling,din", "--lengths", "3,8", "--seeds", "1,2")
    assert "8 trainings, 4 of them" in said
    assert [entry["seeds"] for entry in more["models"]] == [2] * 4
    assert (out / "table.md").read_text().count("| 3 |") == 2 and (out / "plots.png").stat().st_size > 1000


def test_the_length_bounds_what_a_target_sees(stages, tmp_path, monkeypatch, capsys):
    _, found = run(stages, tmp_path / "out", monkeypatch, capsys, "mean_pooling", "--lengths", "1,8")
    assert len({entry["auc"] for entry in found["models"]}) == 2
    lines = read(tmp_path / "out" / "results.jsonl")
    assert [max(part["high"] for part in line["slices"]) for line in lines] == [8, 1]


def test_other_settings_are_other_results(stages, tmp_path, monkeypatch, capsys):
    run(stages, tmp_path / "out", monkeypatch, capsys, "mean_pooling")
    [line] = read(tmp_path / "out" / "results.jsonl")
    (tmp_path / "out" / "results.jsonl").write_text(json.dumps(line | {"sequences": "other rows"}) + "\n")
    said, _ = run(stages, tmp_path / "out", monkeypatch, capsys, "mean_pooling")
    assert "1 trainings, 0 of them" in said


def test_every_kind_can_be_compared_as_it_comes():
    for name in INTERESTS:
        assert model_config(name, ModelConfig()).interest == name
    assert model_config("recent_attention", ModelConfig(recent_window=9)).recent_window == 9


@pytest.mark.parametrize(
    ("models", "lengths", "seeds", "says"),
    [
        (["vql", "rnn"], [], [1], "unknown model 'rnn'"),
        (["vql"], [5, 101], [1], "length 101 is not between 1 and the 100 events"),
        (["vql"], [0], [1], "length 0 is not"),
        ([], [], [1], "nothing to train"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(models, lengths, seeds, says):
    with pytest.raises(StageError, match=says):
        trials_of(models, lengths, seeds, 100)


def test_without_lengths_a_target_sees_all_that_the_partition_gives_it():
    assert trials_of(["vql"], [], [1, 2], 100) == [Trial("vql", 100, 1), Trial("vql", 100, 2)]


def line(model: str, seed: int, auc: float, noise: np.ndarray, users: int = 100) -> dict:
    """A line of results whose AUC is `auc`, and `auc` plus noise in each resample of the users."""
    figures: dict = dict.fromkeys(("gauc", "logloss", "train_seconds", "score_ms_per_target", "parameters"), 1.0)
    third = {"low": 0, "high": 4, "targets": 9, "auc": auc, "gauc": auc, "logloss": 1.0}
    about = {"model": model, "length": 9, "seed": seed, "users": users, "slices": [third]}
    return {**about, "auc": auc, "resampled_auc": (auc + noise).tolist(), **figures}


def test_a_training_that_diverged_is_counted_and_not_averaged():
    failed = {"model": "vql", "length": 9, "seed": 2, "failed": "loss is nan"}
    [entry] = summaries([line("vql", 1, 0.75, np.zeros(RESAMPLES)), failed])
    assert entry["seeds"] == 1 and entry["auc"] == 0.75 and entry["auc_sd"] is None
    assert "| vql | 9 | 1, 1 diverged | 0.7500 | 0.7500 to 0.7500 | - |" in table([entry])
    [none] = summaries([failed])
    assert "| vql | 9 | 0, 1 diverged | - |" in table([none]) and slices_table([none]) == ""


def test_intervals_are_over_seeds_and_users_and_differences_are_paired():
    users = np.random.default_rng(0).normal(0, 0.02, RESAMPLES)  # the same users are easy for every model
    of_seeds = [-0.01, -0.005, 0.0, 0.005, 0.01]
    ours = [line("vql", seed, 0.75 + shift, users) for seed, shift in enumerate(of_seeds)]
    other = [line("din", seed, 0.74 + shift, users) for seed, shift in enumerate(reversed(of_seeds))]
    best, second = summaries(ours + other)
    assert (best["model"], best["difference"]) == ("vql", None) and abs(second["difference"] + 0.01) < 1e-9
    reach = lambda entry, name: (entry[f"{name}_high"] - entry[f"{name}_low"]) / 2 / 1.96  # noqa: E731
    seeds_alone = float(np.std(of_seeds)) / 5**0.5
    assert reach(best, "auc") == pytest.approx((0.02**2 + seeds_alone**2) ** 0.5, rel=0.15)
    # Users have no part in the difference; the seeds of the two models have, and here they pull apart.
    assert reach(second, "difference") == pytest.approx(2 * seeds_alone, rel=0.15)
    few = [one | {"users": LEAST_USERS - 1} for one in ours]
    assert summaries(few)[0]["auc_low"] is None and "| 0.7500 | - | 0.0079 |" in table(summaries(few))


def test_a_result_has_the_figures_of_what_chance_exposed_and_of_the_others(stages, tmp_path, monkeypatch, capsys):
    run(stages, tmp_path / "out", monkeypatch, capsys, "mean_pooling", "--lengths", "8")
    [found] = read(tmp_path / "out" / "results.jsonl")
    rows = trials.Rows.of(trials.Partition(str(stages.warehouse), DATASET, DT, "tiny"))
    expected = [
        is_random
        for user in rows.sequences.to_pylist()
        for is_random, split in zip(user["target_is_random"], user["target_split"], strict=True)
        if split == EVALUATION
    ]
    assert rows.judged_is_random.tolist() == expected
    parts = found["exposures"]
    assert parts["random"]["targets"] == sum(expected) > 0
    assert parts["standard"]["targets"] == len(expected) - sum(expected) > 0
    assert all(len(part[f"resampled_{name}"]) == RESAMPLES for part in parts.values() for name in ("auc", "gauc"))
    assert "| mean_pooling | 1 |" in (tmp_path / "out" / "table.md").read_text().split("AUC, random")[1]


def test_figures_of_an_exposure_are_those_of_its_targets_alone():
    rng = np.random.default_rng(0)
    user, label, is_random = np.repeat(np.arange(50), 8), rng.integers(0, 2, 400).astype(np.int8), rng.random(400) < 0.3
    score = np.where(is_random, rng.random(400), 0.8 * label + 0.1).astype(np.float32)
    scored = ScoredTargets(user, user, user, label, score, np.arange(400))
    whole = trials.quality(scored, is_random)
    assert whole["exposures"]["standard"]["auc"] == whole["exposures"]["standard"]["gauc"] == 1
    assert whole["exposures"]["random"]["auc"] == auc(label[is_random], score[is_random]) < 0.7
    assert "exposures" not in trials.quality(scored, np.zeros(400, bool))
    assert "exposures" not in trials.quality(scored, np.ones(400, bool))


def exposed(model: str, seed: int, standard: float, random: float, noise: np.ndarray) -> dict:
    """A line of results whose AUC and GAUC are these on what the recommender and on what chance showed."""
    whole, parts = line(model, seed, standard, noise), {}
    for kind, value in (("standard", standard), ("random", random)):
        part = line(model, seed, value, noise) | {"gauc": value - 0.1, "targets": 7, "users": 100}
        part["resampled_gauc"] = (value - 0.1 + noise).tolist()
        parts[kind] = {name: value for name, value in part.items() if name not in ("model", "length", "seed", "slices")}
    return whole | {"exposures": parts}


def test_what_chance_showed_stands_beside_what_the_recommender_did_with_intervals_and_paired_differences():
    noise = np.random.default_rng(0).normal(0, 0.01, RESAMPLES)
    lines = [exposed("vql", seed, 0.70, 0.60, noise) for seed in (1, 2)]
    lines += [exposed("din", seed, 0.72, 0.55, noise) for seed in (1, 2)]
    old = [line("eta", 1, 0.9, noise)]  # from before results said it
    head, _, best, second = (row.split(" | ") for row in exposures_table(lines + old).splitlines())
    assert head[2] == "AUC, standard (7 targets)" and head[8] == "AUC, random (7 targets)"
    assert best[:3] == ["| din", "2", "0.7200"] and second[:3] == ["| vql", "2", "0.7000"]
    assert (best[4], best[5], best[6]) == ("+0.0200", "+0.0200 to +0.0200", "0.6200")
    assert (best[8], best[10], best[12], second[8], second[10]) == ("0.5500", "-0.0500", "0.4500", "0.6000", "-")
    low, high = (float(end) for end in second[9].split(" to "))
    assert low < 0.59 < 0.61 < high
    assert exposures_table(old) == ""


def test_a_kind_that_the_rows_cannot_have_is_said_and_the_others_are_trained(stages, tmp_path, monkeypatch, capsys):
    train = trials.train_model

    def choosy(name, *rest):
        if name == "sim_hard":
            raise StageError("items have no category: their fields are item_id", "leave out the models")
        return train(name, *rest)

    monkeypatch.setattr(trials, "train_model", choosy)
    said, found = run(stages, tmp_path / "out", monkeypatch, capsys, "sim_hard,mean_pooling", "--lengths", "8")
    assert "sim_hard, 8 events, seed 7: left out, items have no category" in said
    assert [entry["model"] for entry in found["models"]] == ["mean_pooling"]


@pytest.mark.slow
def test_several_at_a_time_come_to_the_same_figures_as_one(stages, tmp_path, monkeypatch, capsys):
    asked = "--lengths", "8", "--seeds", "1,2"
    one, several = (
        run(stages, tmp_path / jobs, monkeypatch, capsys, "mean_pooling", *asked, "--jobs", jobs)[1] for jobs in "12"
    )
    assert [entry["auc"] for entry in several["models"]] == [entry["auc"] for entry in one["models"]]


def test_what_finds_no_memory_is_no_result_and_said(stages, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(trials, "train_model", full)
    with pytest.raises(StageError, match=r"(?s)1 of 1 trainings found no memory.*smaller --jobs"):
        run(stages, tmp_path / "out", monkeypatch, capsys, "din", "--lengths", "8")
    assert read(tmp_path / "out" / "results.jsonl") == []


def test_a_machine_with_torch_and_arrow_alone_can_train():
    def imported(body: list[ast.stmt]) -> set[str]:
        """Return what is imported when a module is: neither in its functions nor for types alone."""
        found: set[str] = set()
        for node in body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.If | ast.Try) and "TYPE_CHECKING" not in ast.dump(node):
                found |= imported(node.body)
        return found

    seen: set[str] = set()
    others: set[str] = set()
    waiting = ["evaluation.trials"]
    while waiting:
        name = waiting.pop()
        path: Path = ROOT / f"{name.replace('.', '/')}.py"
        path = path if path.exists() else ROOT / name.replace(".", "/") / "__init__.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for other in imported(ast.parse(path.read_text()).body):
            top = other.split(".")[0]
            waiting.append(other) if (ROOT / top).is_dir() else others.add(top)
    assert "training.loop" in seen
    assert others - sys.stdlib_module_names <= {"torch", "triton", "numpy", "pyarrow", "safetensors"}


def in_mlflow() -> tuple:
    """Return the only run of a comparison, and the runs of its trainings by their names."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name(f"{DATASET} comparisons").experiment_id
    [parent] = client.search_runs([experiment], "tags.`pipeline.comparison` LIKE '%'")
    below = runs_below(client, parent)
    assert len({one.data.tags[NAME_TAG] for one in below}) == len(below), "a training has two runs"
    return parent, {one.data.tags[NAME_TAG]: one for one in below}


def test_each_training_has_one_run_below_the_comparisons_with_equal_names(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(RUN_URL_VARIABLE, "http://airflow/run")
    out, asked = tmp_path / "out", ["--lengths", "8", "--seeds", "1,2"]
    run(stages, out, monkeypatch, capsys, "mean_pooling", *asked)
    lines = {training_name(line): line for line in read(out / "results.jsonl")}
    parent, before = in_mlflow()
    assert (parent.info.status, {*before}) == ("FINISHED", {*lines})
    about = parent.data.tags[NOTE_TAG]
    assert "(http://airflow/run)" in about and "SIMULATED" in about and "| mean_pooling | 8 | 2 |" in about
    artifacts = {one.path for one in MlflowClient().list_artifacts(parent.info.run_id)}
    assert artifacts == {"table.md", "plots.png", "comparison.json"}
    one = before["mean_pooling L=8 seed 2"]
    store = TableStore(str(stages.warehouse), DATASET)
    assert {
        "model": "mean_pooling",
        "length": "8",
        "seed": "2",
        "dataset": DATASET,
        "dt": DT,
        "sequences_digest": store.require("sequences", DT).data_digest,
    }.items() <= one.data.params.items()
    line = lines["mean_pooling L=8 seed 2"]
    assert {name: line[name] for name in ("auc", "gauc", "logloss", "train_seconds", "parameters")}.items() <= (
        one.data.metrics.items()
    )
    assert one.data.metrics["history_third_1/auc"] == line["slices"][0]["auc"]
    seconds = (one.info.end_time - one.info.start_time) / 1000
    assert seconds >= line["train_seconds"] - 0.01

    # More trainings come beside those that are there; one that was trained again replaces its run.
    lost = [text for text in (out / "results.jsonl").read_text().splitlines() if '"seed": 2' not in text]
    (out / "results.jsonl").write_text("\n".join(lost) + "\n")
    run(stages, out, monkeypatch, capsys, "mean_pooling", "--lengths", "8", "--seeds", "1,2,3")
    again, after = in_mlflow()
    assert again.info.run_id == parent.info.run_id and again.info.status == "FINISHED" and len(after) == 3
    same = {name for name in before if after[name].info.run_id == before[name].info.run_id}
    assert same == {"mean_pooling L=8 seed 1"}
    history = MlflowClient().get_metric_history(parent.info.run_id, "auc/mean_pooling")
    assert {point.step for point in history} == {8}


def test_a_comparison_ends_as_its_command_does_and_what_diverged_has_failed(stages, tmp_path, monkeypatch, capsys):
    def diverges(*_):
        raise FloatingPointError("loss is nan")

    monkeypatch.setattr(trials, "train_model", diverges)
    run(stages, tmp_path / "out", monkeypatch, capsys, "din", "--lengths", "8")
    parent, below = in_mlflow()
    assert [one.info.status for one in below.values()] == ["FAILED"] and parent.info.status == "FINISHED"

    def crashes(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(trials, "train_model", crashes)
    with pytest.raises(RuntimeError):
        run(stages, tmp_path / "out", monkeypatch, capsys, "vql", "--lengths", "8")
    assert in_mlflow()[0].info.status == "FAILED"


def test_a_comparison_goes_on_without_mlflow_which_has_all_of_it_later(stages, tmp_path, monkeypatch, capsys):
    uri = os.environ["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    for name, value in (("MAX_RETRIES", "0"), ("TIMEOUT", "1")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    said, _ = run(stages, tmp_path / "out", monkeypatch, capsys, "mean_pooling", "--lengths", "8", "--only", "train")
    assert "warning: going on without MLflow" in said
    with pytest.raises(TryAgainError):
        run(stages, tmp_path / "out", monkeypatch, capsys, "mean_pooling", "--lengths", "8", "--only", "show")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    said, _ = run(stages, tmp_path / "out", monkeypatch, capsys, "mean_pooling", "--lengths", "8")
    assert "1 trainings, 1 of them" in said and list(in_mlflow()[1]) == ["mean_pooling L=8 seed 7"]


def test_each_step_alone_does_its_part_and_says_what_stands(stages, tmp_path, monkeypatch, capsys):
    out, result = tmp_path / "out", tmp_path / "result.json"

    def step(only: str, seeds: str) -> dict:
        words = ["--lengths", "8", "--seeds", seeds, "--only", only, "--result", str(result)]
        run(stages, out, monkeypatch, capsys, "mean_pooling", *words)
        return json.loads(result.read_text())

    planned = step("plan", "1,2")
    assert [one["name"] for one in planned["trainings"]] == [f"mean_pooling L=8 seed {seed}" for seed in (1, 2)]
    assert planned["stand"] == 0 and planned["best"] is None and not out.exists()
    assert in_mlflow()[0].info.status == "RUNNING"
    with pytest.raises(StageError, match="none of these 2 trainings stands"):
        step("show", "1,2")
    trained = step("train", "2")
    parent, below = in_mlflow()
    assert trained["run_id"] == below["mean_pooling L=8 seed 2"].info.run_id and not (out / "table.md").exists()
    shown = step("show", "1,2")  # trains nothing
    assert (shown["stand"], shown["run_id"]) == (1, parent.info.run_id) and "| 8 | 1 |" in (
        out / "table.md"
    ).read_text()
    assert shown["best"].startswith("mean_pooling L=8 seed 2, AUC 0.")
