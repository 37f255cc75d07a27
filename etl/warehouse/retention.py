"""What a data set holds that nothing needs any more, found by its age and removed; what is published never changes by
it.

Two ages count. Of a partition: how long ago it was last published, so nobody who began to read it later can hold
anything else. Of the folder of an attempt: how long ago anything in it changed.

Removing is safe during a publication: a partition is looked at under the lock of its pointer (where there is no lock:
its pointer is read once more right before), and nothing that was published since is touched. A removal that was killed
goes on in the next one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow.fs as pafs

from etl.stage.errors import StageError, TryAgainError
from etl.warehouse.manifests import Manifest
from etl.warehouse.pointers import opened
from etl.warehouse.schemas import TABLES
from etl.warehouse.store import SUPERSEDED, TableStore, pointer_path


@dataclass(frozen=True)
class Removed:
    """What was removed, or would be, of one partition or attempt.

    Attributes:
        kind: what it was: `superseded`, `history`, `staging`, `data docs`, `runs` or `reports`.
        name: `table/dt=D`, or the name of the attempt.
    """

    kind: str
    name: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Lineage:
    """What models of a data set need of its tables and runs.

    Attributes:
        versions: how many registered ones there are.
        snapshots: data digests of the `sequences` that registered versions were trained on.
        served: `<model>/<version>` of versions that an alias points at; their user caches stay.
        attempts: attempts that made these.
    """

    versions: int = 0
    snapshots: frozenset[str] = frozenset()
    served: frozenset[str] = frozenset()
    attempts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Cutoffs:
    """Times (Unix milliseconds): of partitions that were last published before them the rest may go; None: never."""

    superseded_ms: int | None
    history_ms: int | None


def prune_partitions(
    store: TableStore, cutoffs: Cutoffs, lineage: Lineage, dry_run: bool, warn: Callable[[str], None]
) -> list[Removed]:
    """Remove superseded files and manifests of the history, partition by partition.

    The current manifest and its files stay; so do those of `sequences` that a registered version was trained on, of the
    `items` that were built with these, and of user caches of served versions; and in the history the manifests that any
    of these, or what is published, was made from.

    Args:
        warn: called with the reason why a partition is left as it is although it is old enough.
    """
    superseded, histories, published_ms = _listed(store)
    oldest = max((ms for ms in (cutoffs.superseded_ms, cutoffs.history_ms) if ms is not None), default=0)
    partitions = [one for one in sorted({*superseded, *histories}) if published_ms.get(one, oldest) < oldest]
    work = [one for one in partitions if superseded.get(one) or len(histories.get(one, ())) > 1]
    if not work:
        return []
    origins = _origins(store, lineage, histories) if cutoffs.history_ms is not None else frozenset()
    removed = []
    for table, dt in work:
        try:
            removed += _pruned_partition(store, table, dt, cutoffs, lineage, origins, dry_run)
        except TryAgainError:
            raise
        except StageError as error:
            warn(f"warning: {table}/dt={dt} is left as it is: {error.what}")
    return removed


def prune_staging(store: TableStore, before_ms: int, running: Collection[str], dry_run: bool) -> list[Removed]:
    """Remove what attempts have staged in which nothing has changed since `before_ms`, but for those of `running`."""
    attempts: dict[str, list[pafs.FileInfo]] = {}
    root = f"{store.root}/_staging/"
    for info in store.fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True)):
        attempts.setdefault(info.path[len(root) :].split("/")[0], []).append(info)
    removed = []
    for attempt, infos in sorted(attempts.items()):
        files = [info for info in infos if info.type == pafs.FileType.File]
        if attempt in running or max(map(_changed_ms, infos)) >= before_ms:
            continue
        if not dry_run:
            _drop_staging(store, f"{root}{attempt}", sorted({info.path[len(root) :].split("/")[1] for info in files}))
        removed.append(Removed("staging", attempt, len(files), sum(info.size for info in files)))
    return removed


def _drop_staging(store: TableStore, folder: str, tries: list[str]) -> None:
    for name in tries:  # the newest last: an older one never becomes the newest. One that begins now stays
        with contextlib.suppress(FileNotFoundError):
            store.fs.delete_dir(f"{folder}/{name}")
    _drop_empty(store, [folder])


Partitioned = Mapping[tuple[str, str], list[pafs.FileInfo]]


def _listed(store: TableStore) -> tuple[Partitioned, Partitioned, Mapping[tuple[str, str], int]]:
    """Return of each partition its superseded files, its history, and when it was last published (Unix
    milliseconds)."""
    superseded: dict[tuple[str, str], list[pafs.FileInfo]] = {}
    histories: dict[tuple[str, str], list[pafs.FileInfo]] = {}
    published_ms = {}
    for top, found in ((SUPERSEDED, superseded), ("_manifests", histories)):
        folder = f"{store.root}/{top}/"
        for info in store.fs.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True)):
            if info.type != pafs.FileType.File:
                continue
            table, day, *rest = info.path[len(folder) :].split("/")
            partition = (table, day.removeprefix("dt="))
            if top == SUPERSEDED or (rest[0] == "history" and info.base_name.endswith(".json")):
                found.setdefault(partition, []).append(info)
            elif rest == ["current.json"]:
                published_ms[partition] = _changed_ms(info)
    return superseded, histories, published_ms


def _origins(store: TableStore, lineage: Lineage, histories: Partitioned) -> frozenset[str]:
    """Return the data digests that published partitions, and snapshots of models, name as their inputs."""
    made = [
        manifest for table in TABLES for dt in store.days(table) if (manifest := store.manifest(table, dt)) is not None
    ]
    snapshots = [info for infos in histories.values() for info in infos if _digest_of(info) in lineage.snapshots]
    made += [store.manifest_at(info.path) for info in snapshots]
    return frozenset(digest for manifest in made for digest in manifest.inputs.values())


def _pruned_partition(
    store: TableStore, table: str, dt: str, cutoffs: Cutoffs, lineage: Lineage, origins: frozenset[str], dry_run: bool
) -> list[Removed]:
    with _still(store, table, dt, dry_run) as unchanged:
        current = store.require(table, dt)
        published_ms = _changed_ms(store.fs.get_file_info(f"{store.root}/{pointer_path(table, dt)}"))
        history = [(info, store.manifest_at(info.path)) for info in _history(store, table, dt)]
        needed = [current, *_needed(store, table, dt, [manifest for _, manifest in history], lineage)]
        digests = {manifest.data_digest for manifest in needed} | origins
        files = {file.path for manifest in needed for file in manifest.files}
        old: dict[str, list[pafs.FileInfo]] = {"history": [], "superseded": []}  # a manifest goes before its files
        # Without its own entry in the history a partition whose pointer is lost would look as if it never was.
        remembered = current in (manifest for _, manifest in history)
        if cutoffs.history_ms is not None and published_ms < cutoffs.history_ms and remembered:
            old["history"] = [info for info, manifest in history if manifest.data_digest not in digests]
        if cutoffs.superseded_ms is not None and published_ms < cutoffs.superseded_ms:
            needed_paths = {f"{store.root}/{SUPERSEDED}/{path}" for path in files}
            there = [info for info in _files(store, f"{SUPERSEDED}/{table}/dt={dt}") if info.path not in needed_paths]
            # One that came just now may be a publisher's whom another one overtook, and who takes it back.
            old["superseded"] = [info for info in there if _changed_ms(info) < cutoffs.superseded_ms]
        removed = []
        for kind, infos in old.items():
            if infos and (dry_run or unchanged()):
                if not dry_run:
                    _delete(store, infos)
                removed.append(Removed(kind, f"{table}/dt={dt}", len(infos), sum(info.size for info in infos)))
        return removed


def _needed(store: TableStore, table: str, dt: str, history: list[Manifest], lineage: Lineage) -> list[Manifest]:
    """Return the manifests of a partition's history whose files models need."""
    if table == "sequences":
        return [manifest for manifest in history if manifest.data_digest in lineage.snapshots]
    if table == "user_caches":
        return [manifest for manifest in history if manifest.settings.get("model_version") in lineage.served]
    if table == "items":
        sequences = _history(store, "sequences", dt)
        attempts = {_attempt_of(info) for info in sequences if _digest_of(info) in lineage.snapshots}
        return [manifest for manifest in history if manifest.attempt in attempts]
    return []


@contextmanager
def _still(store: TableStore, table: str, dt: str, dry_run: bool) -> Iterator[Callable[[], bool]]:
    """Hold a partition's pointer still, where there is a lock; yields whether it is still what it was."""
    path = pointer_path(table, dt)
    if dry_run:
        yield lambda: True
        return
    with opened(store.fs, store.warehouse, f"{store.root}/{path}") as pointer:
        yield lambda: store.read_text(path) == pointer.text


def _delete(store: TableStore, infos: Collection[pafs.FileInfo]) -> None:
    for info in infos:
        # The same bytes may have been published and superseded once more since they were listed.
        now = store.fs.get_file_info(info.path)
        if (now.size, now.mtime_ns) == (info.size, info.mtime_ns):
            store.fs.delete_file(info.path)
    buckets = sorted({os.path.dirname(info.path) for info in infos if "/bucket=" in info.path})
    _drop_empty(store, [*buckets, *sorted({os.path.dirname(bucket) for bucket in buckets})])


def _drop_empty(store: TableStore, folders: Collection[str]) -> None:
    if isinstance(store.fs, pafs.LocalFileSystem):
        for folder in folders:
            with contextlib.suppress(OSError):  # something is in it
                os.rmdir(folder)


def _files(store: TableStore, folder: str) -> list[pafs.FileInfo]:
    infos = store.fs.get_file_info(pafs.FileSelector(f"{store.root}/{folder}", recursive=True, allow_not_found=True))
    return [info for info in infos if info.type == pafs.FileType.File]


def _history(store: TableStore, table: str, dt: str) -> list[pafs.FileInfo]:
    infos = _files(store, f"_manifests/{table}/dt={dt}/history")
    return [info for info in infos if info.base_name.endswith(".json")]


def _digest_of(history: pafs.FileInfo) -> str:
    return history.base_name.split(".")[0]


def _attempt_of(history: pafs.FileInfo) -> str:
    return ".".join(history.base_name.split(".")[1:-2])


def _changed_ms(info: pafs.FileInfo) -> int:
    return (info.mtime_ns or 0) // 1_000_000
