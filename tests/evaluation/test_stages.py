"""evaluate -> register -> promote on real packages and a real registry: aliases, retries, refusals."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from etl.errors import StageError
from evaluation import promote
from evaluation.gate import Decision
from tests.evaluation.conftest import DATASET, DT, NEXT_DT
from training.registry import Registry

FIRST, SECOND = f"{DATASET}-{DT}-00000000-c0", f"{DATASET}-{NEXT_DT}-00000000-c0"


@pytest.fixture
def same_process(monkeypatch):
    """Skip the fresh process where a test is about something else."""
    monkeypatch.setattr(promote, "mechanical_gate", lambda *args: Decision(True, "not checked"))


@pytest.fixture
def lenient(monkeypatch):
    """Untrained models have an AUC near 0.5 on 48 targets: let them pass the quality gate."""
    monkeypatch.setattr(promote, "quality_gate", lambda evaluation, primary: Decision(True, "lenient"))


def chain(stages, attempt, dt=DT, seed=1):
    stages.train(attempt, dt, seed)
    for module in ("main", "register", "promote"):
        stages.run(module, attempt, dt)


def test_first_promotion_with_the_fresh_process_and_its_retry(stages, lenient, capsys):
    chain(stages, FIRST)
    evaluation, registration = stages.json(FIRST, "evaluation"), stages.json(FIRST, "registration")
    assert [row["name"] for row in evaluation["models"]] == ["vql", "softmax_attention", "mean_pooling"]
    assert evaluation["simulated"] is True
    assert evaluation["best_auc"] == 0.8
    assert evaluation["champion"] is None
    assert evaluation["rows"] == {"rows_read": 20, "events": 14, "duplicates": 4, "quarantined": 2}
    assert set(evaluation["paired"]) == {"vql_minus_softmax_attention", "vql_minus_mean_pooling"}
    assert evaluation["models"][0]["targets"] == 48 == sum(part["targets"] for part in evaluation["slices"])
    scores = pq.read_table(stages.runs / FIRST / "scores.parquet")
    assert scores.num_rows == 48
    assert "SIMULATED" in capsys.readouterr().out
    assert registration["gate"]["passed"], registration["gate"]
    assert "same" in registration["gate"]["reason"]
    assert registration["aliases"] == ["challenger", "champion"]
    version = Registry(DATASET).version("1")
    expected = {"pipeline.partition": DT, "pipeline.attempt": FIRST, "config_digest": "c0", "simulated": "true", "validation_status": "passed"}
    assert expected.items() <= version.tags.items()
    assert {"data.snapshot_digest", "mlflow.source.git.commit", "auc", "gauc", "logloss", "gate_reason"} <= version.tags.keys()
    # A retry of every stage finds its own work.
    for module in ("main", "register", "promote"):
        stages.run(module, FIRST)
    assert stages.json(FIRST, "registration") == registration
    assert stages.json(FIRST, "evaluation")["champion"] is None
    assert Registry(DATASET).aliases() == {"challenger": "1", "champion": "1"}
    assert len(Registry(DATASET).client.search_model_versions(f"name = 'vql_{DATASET}'")) == 1
    run = Registry(DATASET).client.get_run(registration["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["vql/auc"] == pytest.approx(evaluation["models"][0]["auc"])
    assert run.data.tags["data.snapshot_digest"] == version.tags["data.snapshot_digest"]


def test_scores_that_are_no_numbers_stop_the_evaluation_and_the_registration(stages):
    stages.train(FIRST)
    [path] = (stages.runs / FIRST / "models" / "vql").glob("*.safetensors")
    weights = load_file(path)
    save_file({name: torch.full_like(w, float("nan")) if w.is_floating_point() else w for name, w in weights.items()}, path)
    with pytest.raises(StageError, match=r"must not be registered[\s\S]*not_a_number_count"):
        stages.run("main", FIRST)
    with pytest.raises(StageError, match="gate model_output stopped attempt"):
        stages.run("register", FIRST)
    assert Registry(DATASET).aliases() == {}


def test_second_promotion_keeps_the_old_champion_for_rollback(stages, lenient, same_process):
    chain(stages, FIRST)
    chain(stages, SECOND, NEXT_DT, seed=2)
    aliases = {"challenger": "2", "champion": "2", "previous_champion": "1"}
    assert Registry(DATASET).aliases() == aliases
    champion = stages.json(SECOND, "evaluation")["champion"]
    assert champion["version"] == "1"
    assert champion["warning"] is None
    assert champion["auc"] is not None
    assert "vql_minus_champion" in stages.json(SECOND, "evaluation")["paired"]
    for module in ("main", "register", "promote"):
        stages.run(module, SECOND, NEXT_DT)
    assert Registry(DATASET).aliases() == aliases
    assert stages.json(SECOND, "evaluation")["champion"]["version"] == "1"
    # The first attempt's retry, late, moves nothing back.
    for module in ("register", "promote"):
        stages.run(module, FIRST)
    assert Registry(DATASET).aliases() == aliases
    # A backfill of the older day is not compared with a champion that was trained on it.
    again = FIRST.replace("c0", "c1")
    stages.train(again)
    stages.run("main", again)
    assert "2022-04-22" in stages.json(again, "evaluation")["champion"]["warning"]


def test_a_refused_challenger_stays_challenger_with_the_reason(stages, same_process, monkeypatch, capsys):
    monkeypatch.setattr(promote, "quality_gate", lambda evaluation, primary: Decision(False, "too weak"))
    chain(stages, FIRST)
    assert stages.json(FIRST, "registration")["aliases"] == ["challenger"]
    assert stages.json(FIRST, "registration")["gate"] == {"passed": False, "reason": "too weak"}
    assert "NOT promoted, stays challenger: too weak" in capsys.readouterr().out
    tags = Registry(DATASET).version("1").tags
    assert (tags["validation_status"], tags["gate_reason"]) == ("failed", "too weak")


def test_a_champion_that_cannot_be_loaded_is_a_warning(stages, lenient, same_process, monkeypatch):
    chain(stages, FIRST)
    stages.train(SECOND, NEXT_DT)
    monkeypatch.setattr(Registry, "package", lambda self, version: stages.runs / "gone")
    stages.run("main", SECOND, NEXT_DT)
    assert "cannot be loaded" in stages.json(SECOND, "evaluation")["champion"]["warning"]


def test_an_artifact_with_other_scores_is_refused(stages, lenient, monkeypatch):
    stages.train(FIRST)
    stages.run("main", FIRST)
    stages.run("register", FIRST)
    real = promote._score_in_fresh_process
    seen = []

    def shifted(*args):
        # Once for real; then as if one score had moved.
        seen.append(real(*args))
        result = json.loads(json.dumps(seen[-1]))
        result["requests"][0][0] += 2e-4
        return result

    monkeypatch.setattr(promote, "_score_in_fresh_process", shifted)
    stages.run("promote", FIRST)
    assert stages.json(FIRST, "registration")["gate"]["passed"] is False
    assert "differs by 0.0002" in stages.json(FIRST, "registration")["gate"]["reason"]
    assert seen[0]["own_code"] is True
    assert seen[0]["pickles"] == []
    assert np.isfinite(seen[0]["example"]).all()


def test_a_data_set_without_user_fields_passes_the_fresh_process(stages, lenient):
    stages.without_user_fields()
    chain(stages, FIRST)
    assert stages.json(FIRST, "registration")["gate"]["passed"], stages.json(FIRST, "registration")["gate"]
    assert stages.json(FIRST, "registration")["aliases"] == ["challenger", "champion"]


def test_missing_inputs_are_named(stages):
    with pytest.raises(StageError, match=r"training\.json is missing"):
        stages.run("main", FIRST)
    stages.train(FIRST)
    with pytest.raises(StageError, match=r"evaluation\.json is missing"):
        stages.run("register", FIRST)
    stages.run("main", FIRST)
    with pytest.raises(StageError, match="has registered no version"):
        stages.run("promote", FIRST)


def test_a_registry_that_is_down_is_not_an_absent_champion(stages, monkeypatch):
    stages.train(FIRST)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(StageError, match="does not answer"):
        stages.run("main", FIRST)


def test_a_champion_that_moved_since_the_evaluation_stops_the_promotion(stages, lenient, same_process):
    chain(stages, FIRST)
    stages.train(SECOND, NEXT_DT)
    stages.run("main", SECOND, NEXT_DT)
    stages.run("register", SECOND, NEXT_DT)
    Registry(DATASET).client.delete_registered_model_alias(f"vql_{DATASET}", "champion")
    with pytest.raises(StageError, match="is version None"):
        stages.run("promote", SECOND, NEXT_DT)
