"""Decide of a published day of `events` whether it is still what the raw files and the definition say, and what may be
done.

Pure: no file is opened here. A day is a function of the raw rows that may lie in it and of the definition's keys that
shape rows; where the raw folder is, and how many buckets a day has, is no part of it. What is published is never built
again from less than it was built from, unless somebody accepts that loss by name.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from etl.datasets.rows_digest import DIGEST_KIND
from etl.ingest.raw import RawFile
from etl.stage.errors import StageError
from etl.warehouse.partitions import days_between, parse_dt
from etl.warehouse.store import Manifest

NAMED = 5  # files in a message


class Action(enum.Enum):
    """What is to be done with a day."""

    FRESH = "fresh"  # as it would be built, or its raw files are past their retention and nothing else has changed
    BUILD = "build"
    KEEP = "keep"  # no longer what its inputs say, but it could only be built from less: it stays as it is
    STOP = "stop"  # it would have to be built, and could only be built from less


@dataclass(frozen=True)
class KnownFile:
    """A raw file as it was when a day was built from it.

    Attributes:
        modified_ns: time of its last change.
        digest: `sha256:...` of its bytes; anything else says nothing about them.
        rows: raw rows of it that were of the day; None: not known.
    """

    name: str
    size: int
    modified_ns: int
    digest: str
    rows: int | None


@dataclass(frozen=True)
class Published:
    """What is published of a day, and what it was built from.

    Attributes:
        rows: events.
        definition: `rows_digest` of the definition; '' where it is of another kind.
        files: every raw file that could hold the day then.
    """

    rows: int
    definition: str
    files: tuple[KnownFile, ...]

    @staticmethod
    def of(manifest: Manifest) -> Published:
        """Return what the manifest of a day of `events` says.

        Raises:
            StageError: what it says of the raw files is no such thing.
        """
        settings, definition = manifest.settings, str(manifest.settings.get("definition", ""))
        name = (
            "raw_files" if "raw_files" in settings else "listing"
        )  # the latter was written before files were judged one by one
        try:
            if name == "raw_files":
                known = json.loads(str(settings[name]))
            else:
                lines = [line.rsplit(" ", 2) for line in str(settings.get(name, "")).splitlines()]
                known = {file: [int(size), int(modified), None] for file, size, modified in lines}
            files = tuple(
                KnownFile(
                    file, int(size), int(modified), manifest.inputs.get(file, ""), None if rows is None else int(rows)
                )
                for file, (size, modified, rows) in sorted(known.items())
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise StageError(
                f"the manifest of {manifest.dataset}/{manifest.table} dt={manifest.dt} has the setting {name}"
                f" {str(settings.get(name))[:80]!r}, which does not say of which size, age and rows its raw files were:"
                f" {error}",
                f"copy the newest good manifest of _manifests/{manifest.table}/dt={manifest.dt}/history over its"
                " current.json",
            ) from error
        return Published(manifest.rows, definition if definition.startswith(DIGEST_KIND) else "", files)


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a day, and why in words."""

    dt: str
    action: Action
    reason: str


def judged(
    dt: str,
    published: Published | None,
    files: Sequence[RawFile],
    definition: str,
    digest_of: Callable[[RawFile], str],
    *,
    wanted: bool = False,
    accept_loss: bool = False,
) -> Verdict:
    """Judge one day.

    Args:
        published: what is published of it, None: nothing.
        files: all raw files that are there now.
        definition: `rows_digest` of the definition.
        digest_of: returns a file's digest as a manifest has it; asked only of a file of the same size with another time
            of change.
        wanted: the day is to be built whether it is fresh or not.
        accept_loss: it may be built from what is left.
    """
    if published is None:
        return Verdict(dt, Action.BUILD, "not published yet")
    changes = _changes(dt, published, files, definition, digest_of)
    because, lost = changes.because, f"raw files are gone: {_names(changes.gone)}"
    if not changes.gone:
        if not published.definition and not because:
            because = "the definition that it was built by is not known"
        return Verdict(
            dt,
            Action.BUILD if because or wanted else Action.FRESH,
            because or ("the partition itself" if wanted else "unchanged"),
        )
    if accept_loss:
        return Verdict(dt, Action.BUILD, "; ".join(filter(None, (because, lost, "the loss is accepted"))))
    if changes.other_definition or wanted:
        return Verdict(dt, Action.STOP, "; ".join(filter(None, (because, lost))))
    if because:
        return Verdict(
            dt, Action.KEEP, f"late rows may have come, but the day can no longer be rebuilt whole ({because}; {lost})"
        )
    return Verdict(dt, Action.FRESH, lost)


@dataclass(frozen=True)
class _Changes:
    """What is not as it was when a day was built.

    Attributes:
        gone: raw files that gave it rows and are there under no name. came: new ones that may hold rows of it.
        changed: others, under the name that they had.
    """

    other_definition: bool
    gone: list[str]
    came: list[str]
    changed: list[str]

    @property
    def because(self) -> str:
        """Why the day would be built again, '' if nothing asks for it."""
        return "; ".join(
            [
                *(["the definition changed"] if self.other_definition else []),
                *([f"raw files came: {_names(self.came)}"] if self.came else []),
                *([f"raw files changed: {_names(self.changed)}"] if self.changed else []),
            ]
        )


def _changes(
    dt: str, published: Published, files: Sequence[RawFile], definition: str, digest_of: Callable[[RawFile], str]
) -> _Changes:
    before, now = {f.name: f for f in published.files}, {f.name: f for f in files}
    holding = {f.name for f in files if f.may_hold(dt)}
    # A file that gave the day no row takes none along; a day without events has none to lose.
    gone = [name for name, f in before.items() if name not in now and f.rows != 0] if published.rows else []
    # A file that was renamed is neither gone nor new.
    moved = {
        name: f.name for name in gone for f in files if f.name not in before and _same_bytes(before[name], f, digest_of)
    }
    changed = [
        name
        for name, f in before.items()
        if name in now and (name not in holding or _is_another(f, now[name], digest_of))
    ]
    return _Changes(
        other_definition=published.definition not in ("", definition),
        gone=[name for name in gone if name not in moved],
        came=sorted(holding - before.keys() - set(moved.values())),
        changed=changed,
    )


def same_rows(manifest: Manifest) -> set[str]:
    """Return the data digests of a day that stand for the rows that it has, however they are cut into buckets."""
    return {manifest.data_digest, *filter(None, str(manifest.settings.get("same_rows_as", "")).split(","))}


def rows_to_keep(staged: Manifest, published: Manifest | None) -> int:
    """Return how many rows a staged day must have: those that are published, unless their loss is accepted."""
    return 0 if published is None or "accepted_loss" in staged.settings else published.rows


def accepted_days(given: Collection[str]) -> frozenset[str]:
    """Return the days that `--accept-loss` names: `DAY`, or `FIRST..LAST`.

    Raises:
        StageError: one is no day.
    """
    days: set[str] = set()
    for text in given:
        first, _, last = text.partition("..")
        days |= set(days_between(parse_dt(first), parse_dt(last or first)))
    return frozenset(days)


def _is_another(before: KnownFile, now: RawFile, digest_of: Callable[[RawFile], str]) -> bool:
    """Whether a file's bytes may differ: copying or moving a file changes its time, not its bytes."""
    if before.size != now.size:
        return True
    return before.modified_ns != now.modified_ns and (
        not before.digest.startswith("sha256:") or digest_of(now) != before.digest
    )


def _same_bytes(before: KnownFile, now: RawFile, digest_of: Callable[[RawFile], str]) -> bool:
    """Whether a file of another name is the one that was there: moved into a folder, or renamed."""
    return before.size == now.size and before.digest.startswith("sha256:") and digest_of(now) == before.digest


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
