"""Each model of an attempt has a run of its own below the attempt's, and one logged model.

Parameters and metrics have the same names in all of them, so that one chart shows models side by side, and over days.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from training.registry import DIGEST_TAG
from training.resume import flat
from training.tracking import ATTEMPT_TAG, NAME_TAG, NOTE_TAG, PARENT_TAG, PARTITION_TAG, runs_below

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run

MODEL_TAG = "pipeline.model"  # group by it: a line a model
ELSEWHERE_TAG = "mlflow.model.isExternal"  # MLflow takes it away once it has the model's files
OF_THE_ATTEMPT = (ATTEMPT_TAG, NAME_TAG, NOTE_TAG)  # what of its tags its models' runs do not have
OF_A_MODEL = (ATTEMPT_TAG, PARTITION_TAG, "pipeline.dataset", "simulated", "data.snapshot_digest", "config_digest")


def model_runs(run: Run, names: Iterable[str]) -> dict[str, str]:
    """Return model -> id of its run below an attempt's run; they are made where there are none."""
    from mlflow import MlflowClient

    client, names = MlflowClient(), list(names)
    found = _by_model(client, run)
    if missing := [name for name in names if name not in found]:
        tags = {key: value for key, value in run.data.tags.items() if key not in OF_THE_ATTEMPT}
        for name in missing:
            dt = tags[PARTITION_TAG]
            own = {PARENT_TAG: run.info.run_id, MODEL_TAG: name, NAME_TAG: f"{dt} {name}"}
            about = {NOTE_TAG: f"`{name}`, trained on the days before {dt} and judged on that day."}
            client.create_run(run.info.experiment_id, tags=tags | own | about)
        found = _by_model(client, run)
    return {name: found[name] for name in names}


def _by_model(client: Any, run: Run) -> dict[str, str]:
    """Return model -> id of its oldest run; doubles of a request that was sent twice are deleted."""
    found: dict[str, str] = {}
    for one in runs_below(client, run):
        name = one.data.tags.get(MODEL_TAG)  # a person may put runs below, too
        if name is not None and found.setdefault(name, one.info.run_id) != one.info.run_id:
            client.delete_run(one.info.run_id)
    return found


def parameters_of(deciding: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return a model's parameters from the settings that decide the weights of all (`TrainConfig.deciding`)."""
    return flat({key: value for key, value in deciding.items() if key != "models"}) | flat(deciding["models"][name])


def logged_model(run: Run, name: str, model_run: str, digest: str) -> LoggedModel:
    """Return the logged model of one of an attempt's models; others of the attempt and this name are deleted.

    A new one has no files in MLflow yet: it says so (`has_files`), and is what metrics belong to.

    Args:
        run: of the attempt.
        model_run: id of the model's run, which it comes from.
        digest: `training.registry.model_digest`.
    """
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModelStatus

    client = MlflowClient()
    attempt = f"tags.`{ATTEMPT_TAG}` = '{run.data.tags[ATTEMPT_TAG]}' AND name = '{name}'"
    there = client.search_logged_models([run.info.experiment_id], filter_string=attempt)
    same = sorted((one for one in there if one.tags.get(DIGEST_TAG) == digest), key=has_files)
    model = same[-1] if same else None
    for one in there:
        if model is None or one.model_id != model.model_id:
            client.delete_logged_model(one.model_id)
    if model is None:
        tags = {key: run.data.tags[key] for key in OF_A_MODEL if key in run.data.tags}
        made = client.create_logged_model(
            run.info.experiment_id,
            name,
            source_run_id=model_run,
            tags=tags | {MODEL_TAG: name, DIGEST_TAG: digest, ELSEWHERE_TAG: "true"},
            params=client.get_run(model_run).data.params,
            model_type="ranker",
        )
        model = client.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
    show_in(model_run, model)
    return model


def show_in(run_id: str, model: LoggedModel) -> None:
    """Let a run list a logged model, and the version that it is registered as, among what came of it."""
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModelOutput

    client = MlflowClient()
    outputs = client.get_run(run_id).outputs
    if model.model_id not in {one.model_id for one in (outputs.model_outputs if outputs else [])}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])


def has_files(model: LoggedModel) -> bool:
    """Whether MLflow has the files of a logged model."""
    return model.status == "READY" and model.tags.get(ELSEWHERE_TAG) != "true"
