"""Who moved the aliases of a registered model, when and why, and which champions were there before.

MLflow keeps what an alias names, and nothing of what it named. So each move is written down before it is carried out,
as a tag of the registered model: they are only ever added. One that died between the two is told by what the next one,
or the registry, found as champion.
"""

from __future__ import annotations

import datetime as dtm
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from evaluation.release.outcomes import PROMOTE, REFUSE, ROLLBACK
from training.registry import ANCHOR, CHAMPION, PREVIOUS_CHAMPION, Registry
from training.tracking import asking_mlflow

RECORD = "release."  # the tags of a model that are records, and those of a version about its last one, begin with it
GATES = "the gates"  # who promotes where no person does


@dataclass(frozen=True)
class Move:
    """One decision on a version.

    Attributes:
        decision: its name; who repeats one under the same name does not take it twice.
        at: UTC, ISO 8601 with milliseconds.
        action: promote, rollback or refuse; the last moves no alias.
        version: what is promoted, rolled back to, or refused.
        by, reason: who, and why.
        champion, anchor: what these aliases named before; None: nothing.
        new_anchor, new_previous: what `anchor` and `previous_champion` name afterwards; None: nothing.
    """

    decision: str
    at: str
    action: str
    version: str
    by: str
    reason: str
    champion: str | None
    anchor: str | None
    new_anchor: str | None
    new_previous: str | None


@dataclass(frozen=True)
class Served:
    """A version that was champion, and the anchor then."""

    version: str
    anchor: str | None


def read_moves(registry: Registry) -> list[Move]:
    """Return what was decided on the versions of a model, the oldest first."""
    records = {key: text for key, text in registry.tags().items() if key.startswith(RECORD)}
    return [Move(**json.loads(text)) for _, text in sorted(records.items())]


def line_of(moves: Sequence[Move], champion: str | None) -> list[Served]:
    """Return the champions that led to the one of now, the oldest first and that one last; a rollback takes its
    champion out of the line.

    Args:
        champion: of now, as the registry has it.

    Returns:
        nothing where there is no champion, or no record names it: somebody has moved the alias by other means.
    """
    line: list[Served] = []
    moves = [move for move in moves if move.action != REFUSE]
    for move, after in zip(moves, [*(move.champion for move in moves), champion][1:], strict=True):
        if after == move.champion:
            continue  # it was not carried out, or undone by other means
        _end_at(line, move.champion)
        if move.champion is not None and not line:
            line.append(Served(move.champion, move.anchor))
        if move.action == ROLLBACK:
            _end_at(line, move.version, below=1)
        if not line or line[-1].version != move.version:
            line.append(Served(move.version, move.new_anchor))
    _end_at(line, champion)
    return line


def _end_at(line: list[Served], version: str | None, below: int = 0) -> None:
    """Cut the line behind the last place of a version, not counting the `below` last ones; all of it, where there is
    none."""
    places = [place for place, served in enumerate(line[: len(line) - below]) if served.version == version]
    del line[places[-1] + 1 if places else 0 :]


def carry_out(registry: Registry, move: Move) -> bool:
    """Write the move down, on the model and on the version, and move the aliases while the champion is still the one
    that the decision was about.

    Returns:
        whether it was. The champion's move is one call, the last.
    """
    client, name = registry.client, registry.name
    with asking_mlflow():
        aliases = registry.aliases()
        if move.action != REFUSE and aliases.get(CHAMPION) != move.champion:
            return False
        if all(replace(known, at=move.at) != move for known in read_moves(registry)):
            key = f"{RECORD}{move.at.replace(':', '').replace('-', '')}"
            client.set_registered_model_tag(name, key, json.dumps(asdict(move), ensure_ascii=False))
        for version in {move.version, move.champion if move.action == ROLLBACK else move.version}:
            _tag_version(registry, str(version), move)
        if move.action != REFUSE:
            for alias, version in ((ANCHOR, move.new_anchor), (PREVIOUS_CHAMPION, move.new_previous)):
                if version is None and alias in aliases:
                    client.delete_registered_model_alias(name, alias)
                elif version is not None and aliases.get(alias) != version:
                    client.set_registered_model_alias(name, alias, version)
            client.set_registered_model_alias(name, CHAMPION, move.version)
    return True


def _tag_version(registry: Registry, version: str, move: Move) -> None:
    for key in ("action", "by", "reason", "at", "decision"):
        registry.client.set_model_version_tag(registry.name, version, f"{RECORD}{key}", getattr(move, key))
    if move.action != REFUSE:
        way = f"{name_of(move.champion)} to version {move.version}"
        registry.client.set_model_version_tag(registry.name, version, f"{RECORD}champion", way)


def now() -> str:
    """Return the time as records have it."""
    return dtm.datetime.now(dtm.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def name_of(version: str | None) -> str:
    """Return how a version, or that there is none, is named in a sentence."""
    return "none" if version is None else f"version {version}"


def table(moves: Sequence[Move]) -> list[str]:
    """Return one line a decision, the oldest first."""
    said = {PROMOTE: "promoted", ROLLBACK: "rolled back", REFUSE: "refused"}
    return [
        f"{move.at}  {said[move.action]:<11}  "
        + (
            f"version {move.version}"
            if move.action == REFUSE
            else f"{name_of(move.champion)} -> version {move.version}"
        )
        + f"  by {move.by}: {move.reason}"
        for move in moves
    ]
