"""Several models on one partition: what is there is not trained again, and the figures are those of a scorer."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from etl.stage.errors import StageError
from evaluation import compare, trials
from evaluation.compare import slices_table, summaries, table
from evaluation.metrics import LEAST_USERS
from evaluation.trials import RESAMPLES, Trial, model_config, read, trials_of
from tests.evaluation.conftest import DATASET, DT
from tests.test_arrows import ROOT
from training.config import ModelConfig
from training.model.interests import INTERESTS


def run(stages, out, monkeypatch, capsys, models: str, *more: str) -> tuple[str, dict]:
    """Compare as the command line does; return what it said, and its last line."""
    words = ["--dataset", DATASET, "--warehouse", str(stages.warehouse), "--dt", DT, "--config", "tiny"]
    monkeypatch.setattr(sys, "argv", ["compare", *words, "--models", models, "--out", str(out), *more])
    compare.main()
    said = capsys.readouterr().out
    return said, json.loads(said.splitlines()[-1])


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
    assert (out / "table.md").read_text().count("| 3 |") == 2 and (out / "auc_by_length.png").stat().st_size > 1000


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
    figures = dict.fromkeys(("gauc", "logloss", "train_seconds", "score_ms_per_target", "parameters"), 1.0)
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
