"""evaluate -> register -> promote on real packages and a real registry: aliases, retries, refusals."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file, save_file

from etl.stage.errors import StageError, TryAgainError
from etl.stage.folder import Folder
from etl.warehouse.store import TableStore
from evaluation.day_scores import DayScores
from evaluation.gate import Decision
from evaluation.prune import prune_runs
from evaluation.release import promote, register
from evaluation.release.outcomes import EVALUATION_PAGE
from tests.evaluation.conftest import DATASET, DT, FIRST, NEXT_DT, SECOND, chain
from tests.s3 import BUCKET, s3_server
from training.model_runs import has_files
from training.registry import Registry
from training.tracking import NOTE_TAG, runs_below

MUCH_LATER_MS = 1 << 50


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as query:
        yield query


def test_first_promotion_with_the_fresh_process_and_its_retry_of_runs_on_s3(stages, s3, lenient, capsys):
    stages.runs = f"s3://{BUCKET}/runs{s3}"
    runs = Folder(stages.runs, "--runs")
    chain(stages, FIRST)
    evaluation, registration = stages.json(FIRST, "evaluation"), stages.json(FIRST, "registration")
    assert [row["name"] for row in evaluation["models"]] == ["vql", "softmax_attention", "mean_pooling"]
    assert evaluation["simulated"] is True
    assert evaluation["best_auc"] == 0.8
    assert evaluation["champion"] is None
    assert evaluation["rows"] == {"rows_read": 20, "events": 14, "duplicates": 4, "quarantined": 2}
    assert set(evaluation["paired"]) == {"vql_minus_softmax_attention", "vql_minus_mean_pooling"}
    assert evaluation["models"][0]["targets"] == 48 == sum(part["targets"] for part in evaluation["slices"])
    assert {part["exposure"] for part in evaluation["exposures"]} == {"random", "standard"}
    assert sum(part["targets"] for part in evaluation["exposures"]) == 48
    kinds = ("activity", "item", "hour", "context")
    groups = {by: [part for part in evaluation["groups"] if part["by"] == by] for by in kinds}
    assert {by: sum(part["targets"] for part in parts) for by, parts in groups.items()} == dict.fromkeys(kinds, 48)
    assert DayScores(runs.below(FIRST)).table().num_rows == 48
    assert "SIMULATED" in capsys.readouterr().out
    assert registration["gate"]["passed"], registration["gate"]
    assert "same" in registration["gate"]["reason"]
    assert registration["aliases"] == ["anchor", "challenger", "champion"]
    version = Registry(DATASET).version("1")
    expected = {
        "pipeline.partition": DT,
        "pipeline.attempt": FIRST,
        "config_digest": "c0",
        "simulated": "true",
        "validation_status": "passed",
    }
    assert expected.items() <= version.tags.items()
    assert f"**Promotion: promoted**: {version.tags['gate_reason']}" in version.description  # the model card
    model = Registry(DATASET).client.get_registered_model(registration["model_name"])
    assert "by a user's whole history" in model.description and "make release" in model.description
    assert {
        "data.snapshot_digest",
        "mlflow.source.git.commit",
        "auc",
        "gauc",
        "logloss",
        "gate_reason",
    } <= version.tags.keys()
    # A retry of every stage finds its own work.
    for module in ("evaluate", "release.register", "release.promote"):
        stages.run(module, FIRST)
    assert stages.json(FIRST, "registration") == registration
    assert stages.json(FIRST, "evaluation")["champion"] is None
    assert Registry(DATASET).aliases() == {"anchor": "1", "challenger": "1", "champion": "1"}
    assert len(Registry(DATASET).client.search_model_versions(f"name = 'vql_{DATASET}'")) == 1
    run = Registry(DATASET).client.get_run(registration["run_id"])
    assert run.info.status == "RUNNING"  # the caches, which end the chain, have not been built
    shown_as_users_of_mlflow_expect(run, evaluation, version)
    assert run.data.tags["data.snapshot_digest"] == version.tags["data.snapshot_digest"]
    stages.run("user_caches", FIRST)
    assert TableStore(str(stages.warehouse), DATASET).require("user_caches", DT).rows == 12
    # What is removed of it is counted, and nothing of it stays.
    assert prune_runs(runs, DATASET, 0, (), False) == prune_runs(runs, "another", MUCH_LATER_MS, (), False) == []
    assert prune_runs(runs, DATASET, MUCH_LATER_MS, (FIRST,), False) == []
    [gone] = prune_runs(runs, DATASET, MUCH_LATER_MS, (), False)
    assert gone.name == FIRST and gone.files > 20 and runs.files() == [] and runs.names() == []


def shown_as_users_of_mlflow_expect(run: Run, evaluation: dict, version: ModelVersion) -> None:
    """A run a model below the attempt's with the same names, and a logged model each, which has the figures, too."""
    client = MlflowClient()
    below = {one.data.tags["pipeline.model"]: one for one in runs_below(client, run)}
    models = {one.name: one for one in client.search_logged_models([run.info.experiment_id])}
    assert below.keys() == models.keys() == {row["name"] for row in evaluation["models"]}
    for row in evaluation["models"]:
        name = row["name"]
        one, model = below[name], models[name]
        expected = {key: row[key] for key in ("auc", "auc_low", "gauc", "logloss", "normalised_entropy") if row[key]}
        expected |= {key: row["calibration"][key] for key in ("ece", "expected_ratio")}
        assert expected == {key: pytest.approx(one.data.metrics[key]) for key in expected}
        assert (one.info.run_name, one.data.tags["pipeline.partition"]) == (f"{DT} {name}", DT)
        assert one.data.tags[NOTE_TAG] == f"`{name}`, trained on the days before {DT} and judged on that day."
        assert [metric.step for metric in client.get_metric_history(one.info.run_id, "auc")][-1] == 20220421
        assert [output.model_id for output in one.outputs.model_outputs] == [model.model_id]
        assert model.source_run_id == one.info.run_id and model.tags["data.snapshot_digest"]
        [auc] = {(m.value, m.dataset_name) for m in model.metrics if m.key == "auc"}
        assert auc == (pytest.approx(row["auc"]), f"{DATASET} sequences/dt={DT}")
        assert has_files(model) == (name == evaluation["primary"])
    assert [output.model_id for output in run.outputs.model_outputs] == [models["vql"].model_id]
    assert version.source == models["vql"].model_uri and version.run_id == below["vql"].info.run_id
    assert run.data.metrics["auc"] == below["vql"].data.metrics["auc"]
    assert run.data.metrics["vql_minus_mean_pooling/auc"] is not None
    page = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{EVALUATION_PAGE}")
    assert "<b>promoted</b>" in page and "mean_pooling" in page
    assert "| mean_pooling | " in run.data.tags[NOTE_TAG] and run.info.run_name == f"{DT} 0000"


def test_requirements_of_a_model_name_no_build_that_an_index_does_not_have(monkeypatch):
    monkeypatch.setattr(register, "installed_version", lambda name: "2.9.1+cpu" if name == "torch" else "3.17.2")
    assert register.requirements()[-1] == "torch==2.9.1"
    assert register.requirements()[0] == "mlflow==3.17.2"


def test_scores_that_are_no_numbers_stop_the_evaluation_and_the_registration(stages):
    stages.train(FIRST)
    [path] = (stages.runs / FIRST / "models" / "vql").glob("*.safetensors")
    weights = load_file(path)
    save_file(
        {name: torch.full_like(w, float("nan")) if w.is_floating_point() else w for name, w in weights.items()}, path
    )
    with pytest.raises(StageError, match=r"must not be registered[\s\S]*not_a_number_count"):
        stages.run("evaluate", FIRST)
    with pytest.raises(StageError, match="gate model_output stopped attempt"):
        stages.run("release.register", FIRST)
    assert Registry(DATASET).aliases() == {}


def test_second_promotion_keeps_the_old_champion_for_rollback(stages, lenient, same_process):
    chain(stages, FIRST)
    chain(stages, SECOND, NEXT_DT, seed=2)
    aliases = {"anchor": "1", "challenger": "2", "champion": "2", "previous_champion": "1"}
    assert Registry(DATASET).aliases() == aliases
    champion = stages.json(SECOND, "evaluation")["champion"]
    assert champion["version"] == "1"
    assert champion["warning"] is None
    assert champion["auc"] is not None
    assert "vql_minus_champion" in stages.json(SECOND, "evaluation")["paired"]
    assert stages.json(SECOND, "evaluation")["anchor"]["version"] == "1"
    run = Registry(DATASET).client.get_run(stages.json(SECOND, "registration")["run_id"])
    page = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/{EVALUATION_PAGE}").partition("Over the partitions")[2]
    figures = [stages.json(attempt, "evaluation")["models"] for attempt in (SECOND, FIRST)]
    assert page.index(f"<td>{NEXT_DT}</td>") < page.index(f"<td>{DT}</td>")
    assert all(f"{row['auc']:.4f} (" in page for rows in figures for row in rows)
    assert "vql_minus_anchor" not in stages.json(SECOND, "evaluation")["paired"]  # it is the champion: scored once
    for module in ("evaluate", "release.register", "release.promote"):
        stages.run(module, SECOND, NEXT_DT)
    assert Registry(DATASET).aliases() == aliases
    assert stages.json(SECOND, "evaluation")["champion"]["version"] == "1"
    # The first attempt's retry, late, moves nothing back.
    for module in ("release.register", "release.promote"):
        stages.run(module, FIRST)
    assert Registry(DATASET).aliases() == aliases
    # A backfill of the older day is not compared with a champion that was trained on it.
    again = FIRST.replace("c0", "c1")
    stages.train(again)
    stages.run("evaluate", again)
    assert "2022-04-22" in stages.json(again, "evaluation")["champion"]["warning"]


def test_a_refused_challenger_stays_challenger_with_the_reason(stages, same_process, capsys):
    """Twelve users: whatever they show, it says nothing of others."""
    chain(stages, FIRST)
    assert stages.json(FIRST, "registration")["aliases"] == ["challenger"]
    gate = stages.json(FIRST, "registration")["gate"]
    assert not gate["passed"]
    assert "lower bound of AUC unknown is not above 0.55 (users: 12)" in gate["reason"]
    assert f"NOT promoted, stays challenger: {gate['reason']}" in capsys.readouterr().out
    tags = Registry(DATASET).version("1").tags
    assert (tags["validation_status"], tags["gate_reason"]) == ("failed", gate["reason"])


def test_a_champion_that_cannot_be_loaded_is_a_warning(stages, lenient, same_process, monkeypatch):
    chain(stages, FIRST)
    stages.train(SECOND, NEXT_DT)
    with monkeypatch.context() as broken:
        broken.setattr(Registry, "package", lambda self, version: stages.runs / "gone")
        stages.run("evaluate", SECOND, NEXT_DT)
    assert "cannot be loaded" in stages.json(SECOND, "evaluation")["champion"]["warning"]
    # Files that are gone are named as such; silence of the server is not taken for either.
    registry = Registry(DATASET)
    location = registry.client.get_logged_model(registry.version("1").source.removeprefix("models:/")).artifact_location
    shutil.rmtree(location.removeprefix("file://"))
    stages.run("evaluate", SECOND, NEXT_DT)
    assert (
        "the files of version 1 of vql_kuairand_simulated are gone"
        in stages.json(SECOND, "evaluation")["champion"]["warning"]
    )

    def silent(*args, **kwargs):
        raise MlflowException("API request to /artifacts failed with exception refused")

    monkeypatch.setattr("mlflow.artifacts.download_artifacts", silent)
    with pytest.raises(TryAgainError):
        stages.run("evaluate", SECOND, NEXT_DT)


def test_an_export_that_is_wrong_in_the_third_decimal_is_refused(stages, lenient):
    stages.train(FIRST)
    stages.run("evaluate", FIRST)
    stages.run("release.register", FIRST)
    [path] = Registry(DATASET).files("1").glob("artifacts/*/model.safetensors")
    weights = load_file(path)
    last = max(name for name in weights if name.startswith("head.") and name.endswith(".bias"))
    assert weights[last].shape == (1,)  # the logit's
    save_file(weights | {last: weights[last] + 0.006}, path)
    stages.run("release.promote", FIRST)
    gate = stages.json(FIRST, "registration")["gate"]
    assert not gate["passed"] and re.search(
        r"user \d+ of the day: the artifact differs by 0\.001\d? ", gate["reason"]
    ), gate
    assert stages.json(FIRST, "registration")["aliases"] == ["challenger"]


def test_a_data_set_without_user_fields_passes_the_fresh_process(stages, lenient):
    stages.without_user_fields()
    chain(stages, FIRST)
    assert stages.json(FIRST, "registration")["gate"]["passed"], stages.json(FIRST, "registration")["gate"]
    assert stages.json(FIRST, "registration")["aliases"] == ["anchor", "challenger", "champion"]


def test_missing_inputs_are_named(stages):
    with pytest.raises(StageError, match=r"training\.json is missing"):
        stages.run("evaluate", FIRST)
    stages.train(FIRST)
    with pytest.raises(StageError, match=r"evaluation\.json is missing"):
        stages.run("release.register", FIRST)
    stages.run("evaluate", FIRST)
    with pytest.raises(StageError, match="has registered no version"):
        stages.run("release.promote", FIRST)


def test_a_registry_that_is_down_is_not_an_absent_champion(stages, monkeypatch):
    stages.train(FIRST)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TryAgainError, match="does not answer"):
        stages.run("evaluate", FIRST)


def test_a_champion_that_moved_since_the_evaluation_is_compared_with_before_the_decision(
    stages, same_process, monkeypatch, capsys
):
    """Version 1 is in service when 2 and 3 are evaluated.

    2 is promoted, then 3 is judged against 2 and never against 1.
    """
    met = []

    def gate(evaluation, primary):
        met.append((evaluation["champion"] or {}).get("version"))
        assert ("vql_minus_champion" in evaluation["paired"]) == (met[-1] is not None)
        return Decision(True, f"compared with {met[-1]}")

    monkeypatch.setattr(promote, "quality_gate", gate)
    chain(stages, FIRST)
    third = SECOND.replace("c0", "c1")
    for seed, attempt in enumerate((SECOND, third), 2):
        stages.train(attempt, NEXT_DT, seed)
        for module in ("evaluate", "release.register"):
            stages.run(module, attempt, NEXT_DT)
    before = stages.json(third, "evaluation")
    stages.run("release.promote", SECOND, NEXT_DT)
    stages.run("release.promote", third, NEXT_DT)
    assert met == [None, "1", "2"]
    assert Registry(DATASET).aliases() == {"anchor": "1", "challenger": "3", "champion": "3", "previous_champion": "2"}
    assert "the champion is version 2 now, the evaluation compared with version 1" in capsys.readouterr().out
    after = stages.json(third, "evaluation")
    assert (before["champion"]["version"], after["champion"]["version"]) == ("1", "2")
    assert after["anchor"]["version"] == "1"
    assert after["paired"]["vql_minus_anchor"]["auc"]["value"] == before["paired"]["vql_minus_champion"]["auc"]["value"]
    assert after["models"] == before["models"]
    assert after["rows"] == before["rows"]
    # Nobody in service any more: judged as a first model is.
    fourth = SECOND.replace("c0", "c2")
    stages.train(fourth, NEXT_DT, 9)
    for module in ("evaluate", "release.register"):
        stages.run(module, fourth, NEXT_DT)
    Registry(DATASET).client.delete_registered_model_alias(f"vql_{DATASET}", "champion")
    stages.run("release.promote", fourth, NEXT_DT)
    assert met[-1] is None
    assert Registry(DATASET).aliases()["champion"] == "4"


def test_a_champion_that_moves_all_the_time_is_tried_again_later(stages, lenient, same_process, monkeypatch):
    chain(stages, FIRST)
    for number in (1, 2):
        attempt = SECOND.replace("c0", f"c{number}")
        stages.train(attempt, NEXT_DT, seed=number + 1)
        stages.run("evaluate", attempt, NEXT_DT)
        stages.run("release.register", attempt, NEXT_DT)
    others = iter("2121212121")
    real = promote.quality_gate

    def somebody_promotes_meanwhile(*args):
        registry = Registry(DATASET)
        registry.client.set_registered_model_alias(registry.name, "champion", next(others))
        return real(*args)

    monkeypatch.setattr(promote, "quality_gate", somebody_promotes_meanwhile)
    with pytest.raises(TryAgainError, match="moved 3 times"):
        stages.run("release.promote", attempt, NEXT_DT)
    assert Registry(DATASET).version("3").tags["validation_status"] == "pending"


def test_the_champions_equal_moves_no_alias(stages, lenient, same_process, capsys):
    """A partition that is processed again gives the same model.

    With it as champion, `previous_champion` would be the champion's twin.
    """
    chain(stages, FIRST)
    chain(stages, SECOND, NEXT_DT, seed=2)
    again = SECOND.replace("c0", "c1")
    chain(stages, again, NEXT_DT, seed=2)
    assert Registry(DATASET).aliases() == {"anchor": "1", "challenger": "3", "champion": "2", "previous_champion": "1"}
    registration = stages.json(again, "registration")
    assert registration["outcome"] == "unchanged"
    assert registration["gate"] == {
        "passed": True,
        "reason": "the same model as the champion, version 2: no alias moves",
    }
    assert "version 3 NOT promoted, it is the champion's equal" in capsys.readouterr().out
    stages.run("release.promote", again, NEXT_DT)
    assert stages.json(again, "registration") == registration
