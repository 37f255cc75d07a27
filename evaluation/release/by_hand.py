"""A person's decision on a registered version, by name and with a reason.

    python -m evaluation.release.by_hand promote  --version N --reason TEXT --dataset D --warehouse W --runs RUNS
    python -m evaluation.release.by_hand refuse   --version N --reason TEXT ...
    python -m evaluation.release.by_hand rollback --reason TEXT ...
    python -m evaluation.release.by_hand list ...

A promotion and a rollback move `champion`, `previous_champion` and `anchor`, and build the user caches of the newest
day that has some anew. A rollback goes to the champion before, by the records of what was promoted, with the anchor of
then. Every decision is written down (`evaluation.release.moves`); `list` shows them, the gates' promotions among them.
"""

from __future__ import annotations

import argparse
import getpass
import json
import uuid
from dataclasses import dataclass
from pathlib import Path

from etl.datasets.arguments import dataset_parser, definition_of
from etl.datasets.definition import DatasetDefinition
from etl.stage.commands import log, run_stage
from etl.stage.errors import GateError, StageError, TryAgainError
from etl.stage.folder import Folder
from etl.stage.identity import attempt_name
from etl.warehouse.store import TableStore
from evaluation.release import promote
from evaluation.release.model_card import write_card
from evaluation.release.moves import RECORD, Move, Served, carry_out, line_of, name_of, now, read_moves, table
from evaluation.release.outcomes import (
    PROMOTE,
    PROMOTED,
    REFUSE,
    REFUSED,
    ROLLBACK,
    ROLLED_BACK,
    UNCHANGED,
    sentence,
    version_problem,
)
from evaluation.user_caches import build_user_caches
from training.package import load_package
from training.registry import ANCHOR, CHAMPION, PREVIOUS_CHAMPION, ArtifactGone, Registry
from training.run_folder import run_folder
from training.tracking import ATTEMPT_TAG, PARTITION_TAG, asking_mlflow

LIST = "list"
OUTCOMES = {PROMOTE: PROMOTED, REFUSE: REFUSED, ROLLBACK: ROLLED_BACK}


def main(argv: list[str] | None = None) -> None:
    """Take one decision, or list those that were taken."""
    args = _parser().parse_args(argv)
    definition = definition_of(args)
    registry = Registry(definition.name)
    if args.action == LIST:
        _list(registry)
        return
    asked = Asked(
        args.action,
        args.version,
        (getpass.getuser() if args.by is None else args.by).strip(),
        args.reason.strip(),
        args.decision or uuid.uuid4().hex,
        args.despite_mechanical_gate,
        args.dry_run,
    )
    desk = _Desk(registry, TableStore(args.warehouse, definition.name), Folder(args.runs, "--runs"), definition, asked)
    with promote.alone(desk.runs, definition.name):
        outcome, version = desk.decided()
    if not asked.dry_run and outcome != REFUSED:
        desk.let_caches_follow(version)
    tags = registry.version(version).tags
    reason = f"by {asked.by}: {asked.reason}"
    log(("would be: " if asked.dry_run else "") + sentence(outcome, registry.name, version, reason))
    if args.result:  # for the DAG `vql_release`
        result = {
            "outcome": outcome,
            "model": registry.name,
            "version": version,
            "by": asked.by,
            "reason": asked.reason,
            "aliases": registry.aliases_of(version),
            "dt": tags.get(PARTITION_TAG, ""),
            "attempt": tags.get(ATTEMPT_TAG, ""),
            "digests": {name: tags[name] for name in promote.DIGESTS if name in tags},
        }
        Path(args.result).write_text(json.dumps(result))


def _parser() -> argparse.ArgumentParser:
    parser = dataset_parser(__doc__)
    parser.add_argument("action", choices=(PROMOTE, REFUSE, ROLLBACK, LIST))
    parser.add_argument(
        "--runs", required=True, help="folder of runs, a path or URI; its lock lets one decide at a time"
    )
    parser.add_argument("--version", help="version of the registered model; a rollback takes none")
    parser.add_argument("--reason", default="", help="why; shown with the decision wherever it is")
    parser.add_argument("--by", help="who decides (default: the name of the login)")
    parser.add_argument(
        "--despite-mechanical-gate",
        action="store_true",
        help="promote although the artifact failed that gate, or cannot be checked any more",
    )
    parser.add_argument("--dry-run", action="store_true", help="make every check, say what would happen, move nothing")
    parser.add_argument(
        "--decision", help="name of the decision: repeated under one name it is taken once (default: a new one)"
    )
    parser.add_argument("--result", help="local file that gets what was decided, as JSON")
    return parser


def _list(registry: Registry) -> None:
    moves, aliases = read_moves(registry), registry.aliases()
    for line in table(moves) or ["no decision is recorded"]:
        print(line)
    print(", ".join(f"{alias}: version {version}" for alias, version in sorted(aliases.items())) or "no alias")
    if CHAMPION in aliases and not line_of(moves, aliases[CHAMPION]):
        print(f"no record names version {aliases[CHAMPION]} as champion: the alias was set by other means")


@dataclass(frozen=True)
class Asked:
    """What a person asks for; the attributes are the command's arguments."""

    action: str
    version: str | None
    by: str
    reason: str
    decision: str
    despite_mechanical_gate: bool
    dry_run: bool


@dataclass(frozen=True)
class _Desk:
    """Takes one decision. Nothing moves before every check is made."""

    registry: Registry
    store: TableStore
    runs: Folder
    definition: DatasetDefinition
    asked: Asked

    def decided(self) -> tuple[str, str]:
        """Return the outcome (of `evaluation.release.outcomes`) and the version that it is about.

        Raises:
            StageError: it cannot be done, or is not complete.
            GateError: the artifact failed the mechanical gate.
        """
        asked = self.asked
        if len(asked.reason.strip(" .")) < 3 or not asked.by:
            raise StageError(
                "a decision needs who takes it and why",
                "give --reason with a sentence that others will understand, and --by with a name",
            )
        if wrong := version_problem(asked.action, asked.version):
            raise StageError(
                f"--{wrong}",
                f"`list` in place of `{asked.action}` shows what was decided; promote --version N serves any version",
            )
        move = self._begun() or self._move()
        if move is None:
            return UNCHANGED, str(asked.version)
        if not asked.dry_run:
            self._carry_out(move)
        return OUTCOMES[move.action], move.version

    def _begun(self) -> Move | None:
        """Return what was begun under the same name, to be completed; None where nothing was.

        Raises:
            StageError: others have been decided since, and it does not hold any more.
        """
        moves, champion = read_moves(self.registry), self.registry.aliases().get(CHAMPION)
        place = next((place for place, move in enumerate(moves) if move.decision == self.asked.decision), None)
        if place is None:
            return None
        move, later = moves[place], moves[place + 1 :]
        if move.action == REFUSE:
            overtaken = any(other.version == move.version for other in later)
        else:
            overtaken = champion != move.version and (
                champion != move.champion or any(other.action != REFUSE for other in later)
            )
        if overtaken:
            raise StageError(
                f"this decision was taken at {move.at}, and others have been taken since; {name_of(champion)} is"
                " champion",
                "take another decision: in Airflow, trigger another run",
            )
        return move

    def _move(self) -> Move | None:
        """Return what is to be done; None where the champion is that model already."""
        aliases, asked = self.registry.aliases(), self.asked
        champion, anchor = aliases.get(CHAMPION), aliases.get(ANCHOR)
        version, new_anchor, new_previous = str(asked.version), anchor, aliases.get(PREVIOUS_CHAMPION)
        if asked.action == ROLLBACK:
            before, served = self._before(champion)
            version = served.version
            new_anchor = served.anchor if served.anchor is None or self._is_there(served.anchor) else version
            new_previous = before if before is not None and self._is_there(before) else None
        self.registry.version(version)
        if asked.action == REFUSE and version == champion:
            raise StageError(f"version {version} is the champion", "roll back first, then refuse it")
        if asked.action == PROMOTE:
            if champion is not None and (version == champion or promote.same_model(self.registry, version, champion)):
                return None
            self._require_mechanical_gate(version)
            # Whoever promotes by hand says what later models are measured by.
            new_anchor, new_previous = version, champion or new_previous
        if asked.action != REFUSE:
            self._require_caches(version)
        return Move(
            asked.decision,
            now(),
            asked.action,
            version,
            asked.by,
            asked.reason[: promote.REASON_LENGTH],
            champion,
            anchor,
            new_anchor,
            new_previous,
        )

    def _is_there(self, version: str) -> bool:
        try:
            self.registry.version(version)
        except TryAgainError:
            raise
        except StageError:
            return False
        return True

    def _before(self, champion: str | None) -> tuple[str | None, Served]:
        """Return the champion before the one of now, and the version before that, by the records.

        Raises:
            StageError: there is none, nobody knows it, or a person has refused it since.
        """
        by_name = f"promote --version N serves any version of {self.registry.name}"
        if champion is None:
            raise StageError(f"{self.registry.name} has no champion to roll back", by_name)
        line = line_of(read_moves(self.registry), champion)
        if not line:
            raise StageError(f"no record says how version {champion} became champion, or what was before", by_name)
        if len(line) < 2:
            raise StageError(f"there was no champion before version {champion}", by_name)
        served = line[-2]
        tags = self.registry.version(served.version).tags
        if tags.get(f"{RECORD}action") == REFUSE:
            raise StageError(
                f"version {served.version}, the champion before, was refused by {tags[f'{RECORD}by']}:"
                f" {tags[f'{RECORD}reason']}",
                by_name,
            )
        return (line[-3].version if len(line) > 2 else None), served

    def _require_mechanical_gate(self, version: str) -> None:
        """Refuse a version whose artifact failed the mechanical gate, unless that is asked for by name. One that has
        not come to it is checked now."""
        if self.asked.despite_mechanical_gate:
            return
        tags = self.registry.version(version).tags
        said = tags.get(promote.MECHANICAL_TAG)
        if said is None:
            dt, attempt = tags[PARTITION_TAG], tags[ATTEMPT_TAG]
            run_dir = run_folder(self.runs.address, self.definition, dt, attempt)
            if not run_dir.exists():
                raise StageError(
                    f"version {version} of {self.registry.name} has not come to the mechanical gate, and cannot any"
                    f" more: {run_dir.address} is gone",
                    "promote another version; --despite-mechanical-gate serves this one all the same",
                )
            promote.checked(self.registry, self.store, dt, run_dir, version)
            said = self.registry.version(version).tags[promote.MECHANICAL_TAG]
        if not said.startswith("passed"):
            raise GateError(
                f"version {version} of {self.registry.name} has not passed the mechanical gate: {said}",
                "promote another version; --despite-mechanical-gate serves this one all the same",
            )

    def _require_caches(self, version: str) -> None:
        """Refuse a version that cannot be loaded, or whose users have no caches, before anything moves."""
        try:
            model, *_ = load_package(self.registry.package(version))
        except ArtifactGone as gone:
            raise StageError(str(gone), "promote --version N serves another version") from gone
        if model.coded is None:
            raise StageError(
                f"version {version} of {self.registry.name} has no codebook, so its users have no caches",
                "promote a VQL model",
            )

    def _carry_out(self, move: Move) -> None:
        if move.action == REFUSE or self.registry.aliases().get(CHAMPION) != move.version:
            if not carry_out(self.registry, move):
                raise TryAgainError(
                    f"the champion of {self.registry.name} moved while this was decided", "run the same command again"
                )
        if move.action != ROLLBACK:
            self._say_on_version(move)

    def _say_on_version(self, move: Move) -> None:
        """Write the outcome where the gates write theirs, so that a stage of the version's attempt finds it decided,
        and into its card."""
        tags = self.registry.version(move.version).tags
        status = tags.get("validation_status", "pending")
        if move.action == REFUSE:
            status = "failed"
        elif status == "pending":
            status = "passed" if tags.get(promote.MECHANICAL_TAG, "").startswith("passed") else "failed"
        outcome = OUTCOMES[move.action]
        said = f"{outcome} by {move.by}: {move.reason}"
        gates = tags.get("gate_reason", "")
        reason = gates if gates.startswith(said) else said + (f" (before: {gates})" if gates else "")
        with asking_mlflow():
            for key, value in (
                ("gate_reason", reason[: promote.REASON_LENGTH]),
                (promote.OUTCOME_TAG, outcome),
                ("validation_status", status),
            ):
                self.registry.client.set_model_version_tag(self.registry.name, move.version, key, value)
        run_dir = run_folder(self.runs.address, self.definition, tags[PARTITION_TAG], tags[ATTEMPT_TAG])
        if run_dir.exists():  # else the card stays as it was: what it is made of is gone
            card = promote.read_training(run_dir), promote.read_evaluation(run_dir)
            write_card(self.registry, self.definition, move.version, *card)

    def let_caches_follow(self, version: str) -> None:
        """Publish the caches of the newest day that has some, or of the version's own where that is newer, anew if they
        are another version's; nothing where that version is not the champion."""
        if self.registry.aliases().get(CHAMPION) != version:
            return
        stamp = f"{self.registry.name}/{version}"
        dt = max([*self.store.days("user_caches"), self.registry.version(version).tags[PARTITION_TAG]])
        published = self.store.manifest("user_caches", dt)
        if published is not None and published.settings.get("model_version") == stamp:
            return
        attempt = attempt_name(self.definition.name, dt, f"{self.asked.decision} {version}")
        manifest = build_user_caches(self.store, dt, attempt, str(self.registry.package(version)), stamp)
        log(f"published {manifest.rows} user caches of dt={dt} for version {version}")


if __name__ == "__main__":
    run_stage(main)
