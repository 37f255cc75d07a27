"""A comparison in MLflow: a run of its own, and below it one a training, whose parameters and metrics have equal names.

The lines of results.jsonl say what is to be there: what MLflow lacks is added by the next call, and no training has a
second run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etl.datasets.definition import DatasetDefinition
from etl.stage.commands import log
from etl.warehouse.store import Manifest, TableStore
from evaluation.figures import metrics_of
from evaluation.metrics import Bootstrap
from evaluation.trials import TABLES
from training.model_runs import MODEL_TAG
from training.tracking import (
    NAME_TAG,
    NOTE_TAG,
    PARENT_TAG,
    asking_mlflow,
    experiment_of,
    kept_open,
    log_origin,
    note_of,
    only_run,
    runs_below,
    set_tags,
    set_tracking,
    standard_tags,
    user_name,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

COMPARISON_TAG, TRAINING_TAG, LINE_TAG = "pipeline.comparison", "pipeline.training", "pipeline.line"
COSTS = ("parameters", "train_seconds", "score_ms_per_target")  # of a model
LONGEST_NOTE = 5_000  # characters of a table in a description; MLflow takes 8,000 in a tag


def training_name(line: Mapping[str, Any]) -> str:
    """Return how a training is called in lists.

    >>> training_name({"model": "vql", "length": 1000, "seed": 7})
    'vql L=1000 seed 7'
    """
    return f"{line['model']} L={line['length']} seed {line['seed']}"


def experiment_name(definition: DatasetDefinition) -> str:
    """Return the experiment of a data set's comparisons: that of its daily runs has their charts over days."""
    return f"{definition.name} comparisons"


@dataclass
class ComparisonRun:
    """The run of a comparison; where MLflow did not answer at the start, all of it costs nothing.

    Attributes:
        run: of the comparison; its `info.run_id` is None where MLflow did not answer.
        inputs: the tables that every training reads, of `store`.
    """

    run: Run
    store: TableStore
    inputs: Sequence[Manifest]
    parameters: Mapping[str, str]
    _below: dict[str, Run] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        return self.run.info.run_id is not None

    def training_id(self, lines: Sequence[Mapping[str, Any]]) -> str | None:
        """Return the id of the run of the only training, or of the comparison where that has none."""
        below = [self._below[name] for name in map(training_name, lines) if name in self._below]
        return below[0].info.run_id if len(below) == 1 else self.run.info.run_id

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Give each training its run; one that has it, of the same line, gets none. Never raises for MLflow's sake."""
        if not self.known:
            return
        try:
            self._add(lines)
        except Exception as error:
            log(f"warning: MLflow takes no trainings now, the next call sends them: {type(error).__name__}: {error}")

    def _add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        client = _client()
        if not self._below:
            self._below = {one.data.tags.get(TRAINING_TAG, ""): one for one in runs_below(client, self.run)}
        for line in lines:
            name, digest = training_name(line), _digest(line)
            there = self._below.get(name)
            if there is not None:
                if there.data.tags.get(LINE_TAG) == digest and there.info.status != "RUNNING":
                    continue
                client.delete_run(there.info.run_id)  # trained again since, or its process died before it was whole
            self._below[name] = self._child(client, line, name, digest)

    def _child(self, client: MlflowClient, line: Mapping[str, Any], name: str, digest: str) -> Run:
        tags = {key: value for key, value in self.run.data.tags.items() if key not in (COMPARISON_TAG, NOTE_TAG)}
        tags |= {PARENT_TAG: self.run.info.run_id, NAME_TAG: name, TRAINING_TAG: name, LINE_TAG: digest}
        began = int(1000 * (time.time() - line.get("train_seconds", 0)))
        made = client.create_run(self.run.info.experiment_id, start_time=began, tags=tags | {MODEL_TAG: line["model"]})
        given = {key: str(line[key]) for key in ("model", "length", "seed", "device") if key in line}
        log_origin(made.info.run_id, {**self.parameters, **given}, self.store, self.inputs)
        client.log_batch(made.info.run_id, metrics=metrics_of(figures_of(line), 0))
        client.set_terminated(made.info.run_id, "FAILED" if "failed" in line else "FINISHED")
        return client.get_run(made.info.run_id)

    def show(self, entries: Sequence[Mapping[str, Any]], report: str, files: Sequence[Path]) -> None:
        """Log the table, the plots, and the figures of each model over its lengths, with their intervals.

        Args:
            entries: of `evaluation.compare.summaries`.
            report: in Markdown; the description of the run as far as it fits.

        Raises:
            TryAgainError: MLflow does not answer.
        """
        if not self.known:
            return
        with asking_mlflow():
            client, run_id = _client(), self.run.info.run_id
            digest = _digest({"entries": entries})
            if self.run.data.tags.get(LINE_TAG) != digest:  # a metric that is logged again would be a second point
                for entry in entries:
                    client.log_batch(run_id, metrics=metrics_of(figures_of_entry(entry), entry["length"]))
                client.set_tag(run_id, LINE_TAG, digest)
            for file in files:
                client.log_artifact(run_id, str(file))
            client.log_dict(run_id, {"models": list(entries)}, "comparison.json")
            about = self.run.data.tags.get(NOTE_TAG, "").partition("\n\n")[0]
            client.set_tag(run_id, NOTE_TAG, f"{about}\n\n{_shortened(report)}")


@contextmanager
def comparison_run(
    definition: DatasetDefinition,
    identity: Mapping[str, Any],
    origin: tuple[TableStore, str],
    required: bool,
    last: bool,
) -> Iterator[ComparisonRun]:
    """Find or create the run of a comparison and yield it; it is RUNNING until the command that shows it has ended.

    Args:
        identity: of rows and configuration (`evaluation.trials.Plan`): what makes figures comparable.
        origin: the store and the name of the configuration.
        required: False: when MLflow does not answer, warn and go on without it.
        last: the run ends FINISHED with the body.

    Raises:
        TryAgainError: MLflow does not answer.
        StageError: it refuses, or the experiment was deleted.
    """
    (store, config), dt, digest = origin, identity["dt"], _digest(identity)
    inputs = [store.require(table, dt) for table in TABLES]
    parameters = {"dataset": definition.name, "dt": dt, "config": config, "config_digest": str(identity["config"])}
    parameters |= {f"{manifest.table}_digest": manifest.data_digest for manifest in inputs}

    def begin() -> Run:
        uri, client = set_tracking(), _client()
        experiment = experiment_of(client, experiment_name(definition), uri)
        note = note_of(definition, dt, f"models side by side, configuration `{config}`")
        first = {NAME_TAG: f"{dt} {config} {digest[:4]}", NOTE_TAG: note, "mlflow.user": user_name()}
        wanted = standard_tags(definition, dt)
        run = only_run(client, experiment, (COMPARISON_TAG, digest), first | wanted)
        set_tags(client, run, wanted, note)
        if run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        return run

    def end(client: MlflowClient, run: Run, status: str) -> None:
        client.set_terminated(run.info.run_id, status)  # those of trainings have ended

    with kept_open(begin, end, required, last) as run:
        found = ComparisonRun(run, store, inputs, parameters)
        log_origin(run.info.run_id, parameters, store, inputs)
        yield found


def figures_of(line: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what MLflow shows of one training."""
    of_metrics = [f"{metric}{end}" for metric in Bootstrap.METRICS for end in ("", "_low", "_high")]
    figures = {name: line.get(name) for name in (*of_metrics, *COSTS, "targets", "users", "epochs")}
    for number, part in enumerate(line.get("slices", ()), 1):
        figures |= {f"history_third_{number}/{metric}": part[metric] for metric in Bootstrap.METRICS}
    return figures


def figures_of_entry(entry: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what MLflow shows of a model at one length, means and intervals over seeds: a chart has all models."""
    names = [f"{metric}{end}" for metric in (*Bootstrap.METRICS, "difference") for end in ("", "_low", "_high")]
    return {f"{name}/{entry['model']}": entry.get(name) for name in (*names, *COSTS, "seeds")}


def _shortened(report: str) -> str:
    """Return the report, or as many of its whole lines as fit a description."""
    if len(report) <= LONGEST_NOTE:
        return report
    return report[:LONGEST_NOTE].rpartition("\n")[0] + "\n\n... `table.md` among the artifacts has the rest."


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _client() -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient()
