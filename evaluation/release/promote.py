"""Two gates, then one move of the alias `champion`: quality against the champion, and the exported artifact in a fresh
process.

MLflow has no "move the alias only if it is still there". So one promotion of a folder of runs works at a time (a lock
file, on a local disk), and the champion is asked for again right before the move: what another machine, or one of a
folder in an object store, does within those milliseconds stays unseen.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.stage.commands import log, run_stage
from etl.stage.errors import EXIT_TRY_AGAIN, StageError, TryAgainError
from etl.stage.folder import Folder
from etl.stage.local_files import one_at_a_time
from etl.warehouse.store import TableStore
from evaluation.evaluate import judge_again, package_of, read_evaluation, read_scores, read_training, write_json
from evaluation.gate import Decision, anchor_after, quality_gate
from evaluation.release.model_card import write_card
from evaluation.release.moves import GATES, Move, carry_out, name_of, now
from evaluation.release.outcomes import PROMOTE, PROMOTED, REFUSED, UNCHANGED, sentence
from evaluation.release.register import request_frame
from evaluation.report import log_report
from training.data import Sequences
from training.registry import ANCHOR, CHAMPION, DIGEST_TAG, PREVIOUS_CHAMPION, ArtifactGone, Registry
from training.run_folder import run_folder
from training.scoring import load_scorer, request_of
from training.tracking import asking_mlflow, attempt_run

OUTCOME_TAG, MECHANICAL_TAG = "promotion", "mechanical_gate"
DIGESTS = (DIGEST_TAG, "data.snapshot_digest", "config_digest")
REASON_LENGTH = 1000
COMPARISONS = 3
SCORE_TOLERANCE = 1e-4
USERS_CHECKED = 4
FRESH_PROCESS_SECONDS = 300


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument(
        "--runs", required=True, help="folder of runs, a path or URI; this one reads and writes RUNS/<attempt>/"
    )
    args = parser.parse_args()
    store = store_of(args)
    run_dir = run_folder(args.runs, definition_of(args), args.dt, args.attempt)
    training, evaluation = read_training(run_dir), read_evaluation(run_dir)
    with (
        alone(Folder(args.runs, "--runs"), args.dataset),
        attempt_run(args.definition, args.dt, args.attempt, {}) as run,
    ):
        registry = Registry(args.dataset)
        version = registry.version_of_attempt(args.attempt, args.dt)
        if version is None:
            raise StageError(
                f"attempt {args.attempt} has registered no version of {registry.name}, or it was deleted",
                "run evaluation.release.register with the same --attempt",
            )
        outcome, decision = _Promotion(registry, store, args, run_dir, training, run.info.run_id, version).decided(
            evaluation
        )
        evaluation = read_evaluation(run_dir)
        write_card(registry, args.definition, version, training, evaluation)
        decided = registry.version(version)
        with asking_mlflow():
            log_report(run.info.run_id, decided.run_id, evaluation, decided.tags)
        aliases, tags = registry.aliases_of(version), decided.tags
    registration = {
        "model_name": registry.name,
        "version": version,
        "run_id": run.info.run_id,
        "experiment_id": run.info.experiment_id,
    }
    write_json(
        run_dir,
        "registration.json",
        registration
        | {
            "aliases": aliases,
            "gate": decision.to_dict(),
            "outcome": outcome,
            "digests": {name: tags[name] for name in DIGESTS if name in tags},
        },
    )
    log(sentence(outcome, registry.name, version, decision.reason))


@dataclass(frozen=True)
class _Promotion:
    """The decision on one version, made once.

    A try that died anywhere in it is repeated safely, since `validation_status` leaves `pending` last.
    """

    registry: Registry
    store: TableStore
    args: argparse.Namespace
    run_dir: Folder
    training: dict
    run_id: str
    version: str

    def decided(self, evaluation: dict) -> tuple[str, Decision]:
        """Return the outcome (of `evaluation.release.outcomes`) and its reason.

        Raises:
            TryAgainError: the champion moves faster than it can be compared with, or MLflow does not answer.
        """
        tags = self.registry.version(self.version).tags
        if tags["validation_status"] != "pending":
            decision = Decision(tags["validation_status"] == "passed", tags["gate_reason"])
            log(f"already decided: {decision.reason}")
            return tags.get(OUTCOME_TAG, PROMOTED if decision.passed else REFUSED), decision
        mechanical: Decision | None = None
        for _ in range(COMPARISONS):
            champion = self.registry.aliases().get(CHAMPION)
            if champion == self.version:  # a try that died behind its move
                return self._write(PROMOTED, Decision(True, tags["gate_reason"]))
            compared = evaluation["champion"]["version"] if evaluation["champion"] else None
            if champion != compared:
                log(
                    f"the champion is {name_of(champion)} now, the evaluation compared with {name_of(compared)}:"
                    " comparing again"
                )
                evaluation = judge_again(self.registry, self.store, self.args, self.run_dir, self.training, self.run_id)
            decision = quality_gate(evaluation, self.training["primary"])
            if decision.passed and champion is not None and same_model(self.registry, self.version, champion):
                return self._write(
                    UNCHANGED, Decision(True, f"the same model as the champion, version {champion}: no alias moves")
                )
            if decision.passed:
                mechanical = mechanical or checked(self.registry, self.store, self.args.dt, self.run_dir, self.version)
                decision = Decision(
                    mechanical.passed,
                    f"{decision.reason}; {mechanical.reason}" if mechanical.passed else mechanical.reason,
                )
            if not decision.passed:
                return self._write(REFUSED, decision)
            if self._moved(champion, anchor_after(evaluation, self.training["primary"], self.version), decision):
                return self._write(PROMOTED, decision)
        raise TryAgainError(
            f"the champion of {self.registry.name} moved {COMPARISONS} times while version {self.version} was compared"
            " with it",
            "run evaluation.release.promote again",
        )

    def _moved(self, champion: str | None, anchor: str, decision: Decision) -> bool:
        """Move the aliases while `champion` is still the one that was compared with."""
        reason, aliases = decision.reason[:REASON_LENGTH], self.registry.aliases()
        with asking_mlflow():
            self.registry.client.set_model_version_tag(self.registry.name, self.version, "gate_reason", reason)
        move = Move(
            decision=self.args.attempt,
            at=now(),
            action=PROMOTE,
            version=self.version,
            by=GATES,
            reason=reason,
            champion=champion,
            anchor=aliases.get(ANCHOR),
            new_anchor=anchor,
            new_previous=champion if champion is not None else aliases.get(PREVIOUS_CHAMPION),
        )
        return carry_out(self.registry, move)

    def _write(self, outcome: str, decision: Decision) -> tuple[str, Decision]:
        """Write the decision on the version, its status last."""
        with asking_mlflow():
            for key, value in (
                ("gate_reason", decision.reason[:REASON_LENGTH]),
                (OUTCOME_TAG, outcome),
                ("validation_status", "passed" if decision.passed else "failed"),
            ):
                self.registry.client.set_model_version_tag(self.registry.name, self.version, key, value)
        return outcome, decision


def same_model(registry: Registry, version: str, other: str) -> bool:
    """Say whether two versions are one model: weights, vocabulary and settings."""
    mine, theirs = (registry.version(one).tags.get(DIGEST_TAG) for one in (version, other))
    return mine is not None and mine == theirs


def checked(registry: Registry, store: TableStore, dt: str, run_dir: Folder, version: str) -> Decision:
    """Return what the mechanical gate says of a version; the version's tag says it, too."""
    training = read_training(run_dir)
    primary = training["primary"]
    decision = mechanical_gate(store, dt, run_dir, primary, training["models"][primary], registry, version)
    with asking_mlflow():
        said = "passed" if decision.passed else f"failed: {decision.reason}"[:REASON_LENGTH]
        registry.client.set_model_version_tag(registry.name, version, MECHANICAL_TAG, said)
    return decision


def alone(runs: Folder, dataset: str) -> AbstractContextManager[None]:
    """Return what holds the lock of a folder of runs, where such a folder can have one."""
    if not runs.is_local:
        return nullcontext()
    lock = Path(runs.root) / f".promotion_of_{dataset}.lock"
    return one_at_a_time(lock, lambda: log(f"another promotion of {dataset} is at work: waiting for it ({lock})"))


def mechanical_gate(
    store: TableStore, dt: str, run_dir: Folder, primary: str, summary: dict, registry: Registry, version: str
) -> Decision:
    """Load the registered artifact in a fresh process, with its own code, and compare its scores with the evaluation's.

    Raises:
        TryAgainError: it cannot be had now, or this machine has no time or memory for it: that says nothing of the
            artifact.
    """
    requests, expected = _requests_to_compare(store, dt, run_dir, primary)
    with package_of(summary) as package:
        scorer = load_scorer(package)
        example = scorer.example_request()
    expected.append(scorer.score_request(example))
    try:
        fresh = _score_in_fresh_process(f"models:/{registry.name}/{version}", requests, registry.uri)
    except subprocess.TimeoutExpired as error:
        raise TryAgainError(
            f"the artifact of version {version} did not score a few requests within {FRESH_PROCESS_SECONDS} s",
            "run evaluation.release.promote again on a less busy machine",
        ) from error
    except subprocess.CalledProcessError as error:
        return _refused_by(error, registry, version)
    if not fresh["own_code"]:
        return Decision(False, "the artifact runs code from elsewhere instead of its own")
    if fresh["pickles"]:
        return Decision(False, f"the artifact holds pickles: {', '.join(fresh['pickles'])}")
    pairs = zip([*fresh["requests"], fresh["example"]], expected, strict=True)
    differences = (float(np.abs(np.asarray(a) - b).max()) if len(a) == len(b) else np.inf for a, b in pairs)
    worst, scores = max(differences, default=np.inf), sum(map(len, expected))
    if not worst <= SCORE_TOLERANCE:
        what = f"differs by {worst:.2g} from the evaluation in {scores} scores"
        return Decision(False, f"the artifact in a fresh process {what}")
    return Decision(True, f"artifact in a fresh process gives the same {scores} scores within {worst:.1g}")


def _requests_to_compare(
    store: TableStore, dt: str, run_dir: Folder, primary: str
) -> tuple[list[dict], list[np.ndarray]]:
    """Return requests of some users of the partition, and the scores that the evaluation had for them."""
    items = store.read(store.require("items", dt))
    sequences = Sequences.from_arrow(store.read(store.require("sequences", dt)))
    evaluated = read_scores(run_dir, ["user_id", primary])
    owner_T, column_T = evaluated["user_id"].to_numpy(), evaluated[primary].to_numpy()
    user_ids, first, count = np.unique(owner_T, return_index=True, return_counts=True)
    # Spread over the users, the one with the most targets among them.
    spread = np.linspace(0, len(user_ids) - 1, min(USERS_CHECKED, len(user_ids))).astype(int)
    chosen = np.unique(np.append(spread, count.argmax()))
    rows = {int(user): row for row, user in enumerate(sequences.user_id)}
    requests = [request_of(items, sequences, rows[int(user_ids[user])]) for user in chosen]
    lengths = [len(request["target_item_id"]) for request in requests]
    return requests, [
        column_T[first[user] : first[user] + length] for user, length in zip(chosen, lengths, strict=True)
    ]


def _refused_by(error: subprocess.CalledProcessError, registry: Registry, version: str) -> Decision:
    """Return what a fresh process that failed says of the artifact.

    Raises:
        TryAgainError: it says nothing of it.
    """
    detail = (error.stderr.strip().splitlines() or [str(error)])[-1]
    if error.returncode == EXIT_TRY_AGAIN:
        try:
            registry.package(version)
        except ArtifactGone as gone:
            return Decision(False, str(gone))
    # A machine without memory ends it by SIGKILL.
    if error.returncode in (EXIT_TRY_AGAIN, -signal.SIGKILL):
        what = f"version {version} of {registry.name} could not be loaded in a fresh process: {detail}"
        raise TryAgainError(what, "run evaluation.release.promote again") from error
    return Decision(False, f"the artifact does not run in a fresh process: {detail}")


def _score_in_fresh_process(model_uri: str, requests: list[dict], tracking_uri: str) -> dict:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_RUN_ID")}
    with tempfile.TemporaryDirectory() as folder:
        requests_file, scores_file = Path(folder) / "requests.json", Path(folder) / "scores.json"
        requests_file.write_text(json.dumps(request_frame(requests).to_dict("list")))
        script = Path(__file__).with_name("fresh_scores.py")
        subprocess.run(
            [sys.executable, "-P", str(script), model_uri, str(requests_file), str(scores_file)],
            cwd=folder,
            check=True,
            env=env | {"MLFLOW_TRACKING_URI": tracking_uri},
            capture_output=True,
            text=True,
            timeout=FRESH_PROCESS_SECONDS,
        )
        return json.loads(scores_file.read_text())


if __name__ == "__main__":
    run_stage(main)
