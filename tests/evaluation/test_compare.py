"""Several models on one partition: what is there is not trained again, and the figures are those of a scorer."""

from __future__ import annotations

import json
import sys

import pytest

from etl.stage.errors import StageError
from evaluation import compare
from evaluation.compare import Trial, model_config, read, summaries, table, trials_of
from tests.evaluation.conftest import DATASET, DT
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
    assert (out / "table.md").read_text().count("\n| ") == 5 and (out / "auc_by_length.png").stat().st_size > 1000


def test_the_length_bounds_what_a_target_sees(stages, tmp_path, monkeypatch, capsys):
    _, found = run(stages, tmp_path / "out", monkeypatch, capsys, "mean_pooling", "--lengths", "1,8")
    assert len({entry["auc"] for entry in found["models"]}) == 2
    lines = read(tmp_path / "out" / "results.jsonl")
    assert [max(part["high"] for part in line["slices"]) for line in lines] == [1, 8]


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


def test_a_training_that_diverged_is_counted_and_not_averaged():
    figures = dict.fromkeys(("gauc", "logloss", "auc_low", "auc_high", "train_seconds", "parameters"), 1.0)
    good = {"model": "vql", "length": 9, "auc": 0.75, "score_ms_per_target": 0.1, **figures}
    [entry] = summaries([good | {"seed": 1}, {"model": "vql", "length": 9, "seed": 2, "failed": "loss is nan"}])
    assert entry["seeds"] == 1 and entry["auc"] == 0.75 and entry["auc_sd"] is None
    assert "| vql | 9 | 1, 1 diverged | 0.7500 | - |" in table([entry])
    [none] = summaries([{"model": "vql", "length": 9, "seed": 2, "failed": "loss is nan"}])
    assert "| vql | 9 | 0, 1 diverged | - |" in table([none])
