"""Two gates, then one move of the alias `champion`: quality against the champion, and the registered artifact run in an
environment of its own.

MLflow has no "move the alias only if it is still there". So one promotion of a folder of runs works at a time (a lock
file, on a local disk), and the champion is asked for again right before the move: what another machine, or one of a
folder in an object store, does within those milliseconds stays unseen.
"""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from etl.datasets.arguments import definition_of, partition_parser, store_of
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError, TryAgainError
from etl.stage.folder import Folder
from etl.stage.local_files import one_at_a_time
from etl.warehouse.store import TableStore
from evaluation.evaluate import judge_again, read_evaluation, read_training, write_json
from evaluation.gate import Decision, anchor_after, quality_gate
from evaluation.release.mechanical_gate import mechanical_gate
from evaluation.release.model_card import write_card
from evaluation.release.moves import GATES, Move, carry_out, name_of, now
from evaluation.release.outcomes import PROMOTE, PROMOTED, REFUSED, UNCHANGED, sentence
from evaluation.report import log_report
from evaluation.spread import add_arguments
from training.registry import ANCHOR, CHAMPION, DIGEST_TAG, PREVIOUS_CHAMPION, Registry
from training.run_folder import run_folder
from training.tracking import asking_mlflow, attempt_run

OUTCOME_TAG, MECHANICAL_TAG = "promotion", "mechanical_gate"
DIGESTS = (DIGEST_TAG, "data.snapshot_digest", "config_digest")
REASON_LENGTH = 1000
COMPARISONS = 3


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument(
        "--runs", required=True, help="folder of runs, a path or URI; this one reads and writes RUNS/<attempt>/"
    )
    add_arguments(parser)
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
    decision = mechanical_gate(store, dt, run_dir, training, registry, version)
    with asking_mlflow():
        said = f"{'passed' if decision.passed else 'failed'}: {decision.reason}"[:REASON_LENGTH]
        registry.client.set_model_version_tag(registry.name, version, MECHANICAL_TAG, said)
    return decision


def alone(runs: Folder, dataset: str) -> AbstractContextManager[None]:
    """Return what holds the lock of a folder of runs, where such a folder can have one."""
    if not runs.is_local:
        return nullcontext()
    lock = Path(runs.root) / f".promotion_of_{dataset}.lock"
    return one_at_a_time(lock, lambda: log(f"another promotion of {dataset} is at work: waiting for it ({lock})"))


if __name__ == "__main__":
    run_stage(main)
