"""From a version alone: what it was trained with and on, and the same metrics again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from etl.stage.errors import GateError, StageError
from evaluation.release import reproduce
from evaluation.release.reproduce import require_same_tables, side_by_side, training_options
from tests.evaluation.conftest import DATASET, DT
from training.registry import ArtifactGone, Registry
from training.tracking import ROOT

COMMAND = "python -m training.train --dataset kuairand --warehouse '/a b/w' --dt 2022-04-21 --attempt a --runs r"


def test_the_options_that_decide_weights_come_from_the_tags_and_no_others():
    tags = {"pipeline.command": f"{COMMAND} --config tiny --workers=0 --seed 8"}
    assert training_options(tags, "3", package_of) == ["--config", "tiny", "--seed", "8", "--workers", "0"]
    assert training_options({"pipeline.command": f"{COMMAND} --warm-start none"}, "3", package_of) == []


@pytest.mark.parametrize(
    ("begun", "options"),
    [("2", ["--warm-start", "/packages/2"]), ("none", []), ("s3://b/p", ["--warm-start", "s3://b/p"])],
)
def test_a_warm_start_begins_with_what_the_version_began_with(begun, options):
    """`--warm-start champion` says nothing of which version that was, or whether there was one."""
    tags = {"pipeline.command": f"{COMMAND} --warm-start champion", "warm_start": begun}
    assert training_options(tags, "3", package_of) == options


def package_of(version: str) -> Path:
    if version != "2":
        raise ArtifactGone(f"the files of version {version} are gone")
    return Path("/packages/2")


@pytest.mark.parametrize(
    ("tags", "what"),
    [
        ({}, "version 3 does not say how it was trained"),
        ({"pipeline.command": f"{COMMAND} --warm-start champion"}, "and does not say of which"),
        (
            {"pipeline.command": f"{COMMAND} --warm-start champion", "warm_start": "1"},
            "began with the weights of version 1: the files of version 1 are gone",
        ),
    ],
)
def test_what_cannot_be_repeated_is_refused(tags, what):
    with pytest.raises(StageError, match=what):
        training_options(tags, "3", package_of)


def test_other_tables_than_the_versions_are_named():
    tags = {"data.snapshot_digest": "5c", "data.items_digest": "1d"}
    require_same_tables({"sequences": "5c", "items": "1d"}, tags, "2022-04-21")
    with pytest.raises(StageError, match="items of dt=2022-04-21 are 2e, the version was trained on 1d"):
        require_same_tables({"sequences": "5c", "items": "2e"}, tags, "2022-04-21")


def test_a_commit_that_is_not_there_is_named():
    with pytest.raises(StageError, match=f"the code of commit {'0' * 40} cannot be had"), reproduce._code_of("0" * 40):
        pass


def test_metrics_stand_side_by_side():
    shown = side_by_side({"auc": "0.712345"}, {"auc": 0.712345, "gauc": float("nan")}, same_model=False)
    assert shown.splitlines()[1].split() == ["auc", "0.712345", "0.712345"]
    assert shown.splitlines()[2].split() == ["gauc", "-", "-"] and shown.endswith("other ones")


@pytest.mark.slow
def test_one_command_trains_a_version_again_and_prints_the_same_metrics(stages, capsys):
    attempt = f"{DATASET}-{DT}-00000000-c0"
    place = ["--dataset", DATASET, "--warehouse", str(stages.warehouse), "--dt", DT, "--attempt", attempt]
    more = ["--config", "tiny", "--workers", "0", "--models", "vql"]
    # A process of its own, as the command starts one: this one may have fewer threads, whose sums have other bits.
    words = [sys.executable, "-m", "training.train", *place, "--runs", str(stages.runs), *more]
    subprocess.run(words, cwd=ROOT, check=True)
    stages.run("evaluate", attempt)
    stages.run("release.register", attempt)
    capsys.readouterr()
    reproduce.main(["--dataset", DATASET, "--warehouse", str(stages.warehouse), "--version", "1"])
    said = capsys.readouterr().out
    assert "the weights are the same, bit for bit" in said
    assert len(Registry(DATASET).client.search_runs(["1"])) == 2  # the attempt's and its model's: no other
    Registry(DATASET).client.set_model_version_tag(f"vql_{DATASET}", "1", "auc", "0.123")
    with pytest.raises(GateError, match="auc of version 1 came out otherwise"):
        reproduce.main(["--dataset", DATASET, "--warehouse", str(stages.warehouse), "--version", "1"])
