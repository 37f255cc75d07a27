"""One attempt is one partition's; promotions that meet are decided one after the other."""

from __future__ import annotations

import os
import shutil
import sys

import pytest

from etl.datasets.definition import dataset
from etl.stage.errors import StageError
from infra import settings
from tests.evaluation.conftest import DATASET, DT, NEXT_DT
from tests.processes import start
from training.registry import Registry
from training.run_folder import run_folder

ATTEMPT = "by-hand"
# Untrained models have an AUC near 0.5 on 48 targets: the gate lets them pass, and says what it has compared.
PROMOTE = """
from evaluation.release import promote
from evaluation.gate import Decision
promote.quality_gate = lambda evaluation, primary: Decision(
    True, f"compared with {(evaluation['champion'] or {}).get('version')}")
promote.mechanical_gate = lambda *args: Decision(True, "not checked")
promote.run_stage(promote.main)
"""


def test_an_attempt_of_one_day_is_refused_for_another_one(stages):
    stages.train(ATTEMPT)
    for module in ("evaluate", "release.register"):
        stages.run(module, ATTEMPT)
    before = {path: path.read_bytes() for path in (stages.runs / ATTEMPT).glob("*.json")}
    for module in ("evaluate", "release.register", "release.promote"):
        with pytest.raises(StageError, match=r"attempt by-hand belongs to dt 2022-04-21, not 2022-04-22"):
            stages.run(module, ATTEMPT, NEXT_DT)
    assert {path: path.read_bytes() for path in (stages.runs / ATTEMPT).glob("*.json")} == before
    # In another folder of runs, by the run in MLflow.
    shutil.copytree(stages.runs / ATTEMPT, elsewhere := stages.runs.parent / "elsewhere" / ATTEMPT)
    (elsewhere / "attempt.json").unlink()
    stages.runs = elsewhere.parent
    with pytest.raises(
        StageError, match=r"attempt by-hand belongs to dt=2022-04-21 of kuairand_simulated .*, not to dt=2022-04-22"
    ):
        stages.run("evaluate", ATTEMPT, NEXT_DT)
    assert Registry(DATASET).version("1").tags["pipeline.partition"] == DT
    with pytest.raises(
        StageError, match="has registered version 1 of vql_kuairand_simulated for dt=2022-04-21, not for dt=2022-04-22"
    ):
        Registry(DATASET).version_of_attempt(ATTEMPT, NEXT_DT)


@pytest.mark.parametrize(
    ("name", "digest", "says"),
    [
        (DATASET, "c1", "config c0, not c1"),
        ("kuairec_big", "c0", "dataset kuairand_simulated, not kuairec_big and definition rows1:"),
    ],
)
def test_an_attempt_keeps_its_configuration_and_its_data_set(tmp_path, name, digest, says):
    run_folder(str(tmp_path), dataset(DATASET), DT, ATTEMPT, "c0")
    run_folder(str(tmp_path), dataset(DATASET), DT, ATTEMPT, "c0")
    with pytest.raises(StageError, match=f"attempt by-hand belongs to {says}"):
        run_folder(str(tmp_path), dataset(name), DT, ATTEMPT, digest)
    assert not run_folder(str(tmp_path), dataset(DATASET), DT, "misspelled").exists()


def test_two_promotions_at_once_are_decided_one_after_the_other(stages, tmp_path):
    attempts = [f"kuairand_simulated-{NEXT_DT}-{number}" for number in range(3)]
    words = [
        sys.executable,
        "-c",
        PROMOTE,
        "--dataset",
        DATASET,
        "--warehouse",
        str(stages.warehouse),
        "--dt",
        NEXT_DT,
        "--runs",
        str(stages.runs),
        "--attempt",
    ]

    def promotion(attempt: str):
        return start([*words, attempt], tmp_path / f"{attempt}.log", settings.ROOT, dict(os.environ))

    for seed, attempt in enumerate(attempts, 1):
        stages.train(attempt, NEXT_DT, seed)
        for module in ("evaluate", "release.register"):
            stages.run(module, attempt, NEXT_DT)
        if seed == 1:
            assert promotion(attempt).finish()[0] == 0
    for both in [promotion(attempt) for attempt in attempts[1:]]:
        code, said = both.finish()
        assert code == 0, said
    registry = Registry(DATASET)
    aliases = registry.aliases()
    second = aliases["champion"]
    first = ({"2", "3"} - {second}).pop()
    assert aliases["previous_champion"] == first
    reasons = [registry.version(version).tags["gate_reason"].partition(";")[0] for version in ("1", first, second)]
    assert reasons == ["compared with None", "compared with 1", f"compared with {first}"]
