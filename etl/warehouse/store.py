"""Where tables live and how a partition becomes visible: write under an attempt's staging, audit, publish one manifest.

    <warehouse>/<dataset>/_staging/<attempt>/<try>/try.json                           written when a job begins to stage
    <warehouse>/<dataset>/_staging/<attempt>/<try>/<table>/dt=D/bucket=NNN/part.parquet       written by that job
    <warehouse>/<dataset>/_staging/<attempt>/<try>/<table>/dt=D/manifest.json         written last by the same job
    <warehouse>/<dataset>/<table>/dt=D/bucket=NNN/<content digest>.parquet   what is published now
    <warehouse>/<dataset>/_superseded/<table>/dt=D/bucket=NNN/<content digest>.parquet   what was published before
    <warehouse>/<dataset>/_manifests/<table>/dt=D/current.json                        the manifest that readers follow
    <warehouse>/<dataset>/_manifests/<table>/dt=D/history/<data digest>.<attempt>.<digest>.json   all ever published

Readers read what the current manifest lists and nothing else. File names are content digests, so publishing the same
data twice changes nothing; files of a manifest that a reader holds are never overwritten, and found where they were
moved.

A job that runs again for the same attempt begins a new try, with a folder of its own: a zombie, a try that outlived its
retry, writes where nobody looks. What counts of an attempt is the newest try that was begun, and that only where it is
complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.stage.errors import StageError, kind_of
from etl.stage.folder import OBJECT_STORES, Folder
from etl.stage.local_files import sync
from etl.stage.uris import below
from etl.warehouse.manifests import DataFile, Manifest
from etl.warehouse.pointers import Moved, opened
from etl.warehouse.schemas import TABLES, table_schema

ROW_GROUP_ROWS = 1 << 20
SUPERSEDED = "_superseded"
REQUESTS = 8  # small files that are read at once
Found = TypeVar("Found")


@dataclass(frozen=True)
class Try:
    """One run of a job that stages, with a folder of its own below its attempt's.

    Attributes:
        name: the folder's name; the later of two tries of an attempt has the greater one.
        tables, days: what it stages; of these, older tries count no more, whether this one ends or not.
        dt: the partition that its attempt builds; '' of a job that builds none, or of a record of earlier versions.
        expected: `table/dt=D` -> data digest of what was published when it began, '' where nothing was.
    """

    attempt: str
    name: str
    tables: tuple[str, ...]
    days: tuple[str, ...]
    begun_at_ms: int
    dt: str = ""
    expected: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def folder(self) -> str:
        """Path below the dataset's folder."""
        return f"_staging/{self.attempt}/{self.name}"

    def partition_dir(self, table: str, dt: str) -> str:
        """Path of a staged partition below the dataset's folder."""
        return f"{self.folder}/{table}/dt={dt}"


@dataclass(frozen=True)
class Staged:
    """A completely staged partition and the try that staged it."""

    work: Try
    manifest: Manifest


def code_version() -> str:
    """Return the git commit of the running code (`LONGVIEW_CODE_VERSION` wins, for images without git)."""
    import subprocess

    if version := os.environ.get("LONGVIEW_CODE_VERSION"):
        return version
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class TableStore(Folder):
    """All tables of one data set below one warehouse root (a local path or any URI that Arrow reads)."""

    def __init__(self, warehouse: str, dataset: str) -> None:
        super().__init__(below(warehouse, dataset), "--warehouse")
        self.warehouse = warehouse if "://" in warehouse else os.path.abspath(warehouse)
        self.dataset = dataset
        self._tries: dict[str, Try] = {}  # by the path of their record

    # ---- staging -------------------------------------------------------------------------------------------------

    def published(self, tables: Sequence[str], days: Sequence[str]) -> dict[tuple[str, str], Manifest]:
        """Return (table, day) -> current manifest of what is published of these, each read once."""
        names = [(table, day) for table in tables for day in days]
        with ThreadPoolExecutor(REQUESTS) as pool:
            found = list(pool.map(lambda name: self.manifest(*name), names))
        return {name: manifest for name, manifest in zip(names, found, strict=True) if manifest is not None}

    def begin_try(
        self,
        attempt: str,
        tables: Sequence[str],
        days: Sequence[str],
        dt: str = "",
        published: Mapping[tuple[str, str], Manifest] | None = None,
    ) -> Try:
        """Begin to stage these tables and days: what earlier tries of the attempt staged of them counts no more.

        Args:
            dt: the partition that is built; '' for a job that builds none.
            published: what the job builds on, where it has read that already: nobody may publish anything else
                meanwhile.

        Raises:
            StageError: the attempt has begun to build another partition.
        """
        earlier = self.tries(attempt)
        require_one_day(attempt, dt, earlier)
        number = 1 + (int(earlier[0].name.split("-")[1]) if earlier else 0)
        if published is None:
            published = self.published(tables, days)
        expected = {
            f"{table}/dt={day}": m.data_digest if (m := published.get((table, day))) else ""
            for table in tables
            for day in days
        }
        work = Try(
            attempt,
            f"try-{number:04d}-{uuid.uuid4().hex[:8]}",
            tuple(tables),
            tuple(days),
            round(time.time() * 1_000),
            dt,
            expected,
        )
        self.write_text(f"{work.folder}/try.json", json.dumps(asdict(work), indent=1, sort_keys=True))
        self._drop_staged(earlier, tables, days)
        return work

    def tries(self, attempt: str) -> list[Try]:
        """Return the tries that this attempt has begun, newest first.

        A folder without a record is what a zombie left.
        """
        infos = self.fs.get_file_info(pafs.FileSelector(f"{self.root}/_staging/{attempt}", allow_not_found=True))
        names = sorted((info.base_name for info in infos if info.type == pafs.FileType.Directory), reverse=True)
        return [work for name in names if (work := self._try(f"_staging/{attempt}/{name}/try.json")) is not None]

    def _try(self, path: str) -> Try | None:
        """Return the try of a record, which is read once: nothing ever changes it. None: there is none (yet)."""
        if path not in self._tries and (text := self.read_text(path)) is not None:
            raw = json.loads(text)
            self._tries[path] = Try(**{**raw, "tables": tuple(raw["tables"]), "days": tuple(raw["days"])})
        return self._tries.get(path)

    def _drop_staged(self, tries: Sequence[Try], tables: Sequence[str], days: Sequence[str]) -> None:
        """Drop what some tries have staged of these tables and days.

        Their records stay, so that none of them counts again.
        """
        for work in tries:
            for table in set(tables) & set(work.tables):
                whole = set(work.days) <= set(days)
                for path in (
                    [f"{work.folder}/{table}"]
                    if whole
                    else [work.partition_dir(table, day) for day in set(days) & set(work.days)]
                ):
                    self._drop(path)

    def drop_staging(self, attempt: str) -> None:
        """Drop all that an attempt has staged."""
        self._drop(f"_staging/{attempt}")

    def _drop(self, path: str) -> None:
        """Drop a folder of staging. What a zombie writes into it meanwhile may stay: nobody looks there."""
        full = f"{self.root}/{path}"
        self._tries.clear()
        if self.fs.get_file_info(full).type != pafs.FileType.NotFound:
            with contextlib.suppress(OSError):
                self.fs.delete_dir(full)

    def write_file(self, work: Try, table: str, dt: str, bucket: int, rows: pa.Table) -> DataFile:
        """Write one bucket of a staged partition (zstd, explicit schema, deterministic bytes).

        On any machine, in any process.
        """
        schema = table_schema(table, rows.schema)
        rows = rows.select(schema.names).cast(schema).combine_chunks()
        sink = pa.BufferOutputStream()
        # Times and offsets inside lists are sorted: delta encoding stores them in a byte or two.
        delta = [
            name
            for name in (
                "event_time_ms",
                "history_time_ms.list.element",
                "target_time_ms.list.element",
                "target_history_end.list.element",
                "user_id",
                "item_id",
            )
            if name.split(".")[0] in schema.names
        ]
        encodings = {name: "DELTA_BINARY_PACKED" for name in delta}
        dictionary = [leaf for leaf in _leaf_names(schema) if leaf not in encodings]
        pq.write_table(
            rows,
            sink,
            compression="zstd",
            compression_level=3,
            row_group_size=ROW_GROUP_ROWS,
            use_dictionary=dictionary,
            column_encoding=encodings,
        )
        body = sink.getvalue()
        path = f"{work.partition_dir(table, dt)}/bucket={bucket:03d}/part.parquet"
        self.write_bytes(path, body)
        return DataFile(bucket, rows.num_rows, body.size, hashlib.sha256(body).hexdigest(), path)

    def write_staged_manifest(self, work: Try, manifest: Manifest) -> None:
        """Write the manifest of a staged partition; the last act of the job that built it."""
        self.write_text(f"{work.partition_dir(manifest.table, manifest.dt)}/manifest.json", manifest.to_json())

    def staged(self, attempt: str, table: str, dt: str) -> Staged | None:
        """Return the partition as the newest try that was begun for it has staged it, None where that one is not
        complete.
        """
        work = next((one for one in self.tries(attempt) if f"{table}/dt={dt}" in one.expected), None)
        text = self.read_text(f"{work.partition_dir(table, dt)}/manifest.json") if work else None
        return self._as_staged(work, table, dt, text) if work and text is not None else None

    def staged_manifest(self, attempt: str, table: str, dt: str) -> Manifest | None:
        """Return the manifest of a completely staged partition, else None."""
        staged = self.staged(attempt, table, dt)
        return staged.manifest if staged else None

    def staged_partitions(self, attempt: str, table: str) -> dict[str, Staged]:
        """Return day -> what this attempt has staged completely of `table`, oldest day first."""
        newest: dict[str, Try] = {}
        for work in reversed(self.tries(attempt)):
            newest |= dict.fromkeys(work.days, work) if table in work.tables else {}
        days = []
        for work in dict.fromkeys(newest.values()):
            infos = self.fs.get_file_info(pafs.FileSelector(f"{self.root}/{work.folder}/{table}", allow_not_found=True))
            names = [info.base_name.removeprefix("dt=") for info in infos if info.type == pafs.FileType.Directory]
            days += [day for day in names if newest.get(day) == work]
        with ThreadPoolExecutor(REQUESTS) as pool:
            texts = list(
                pool.map(
                    lambda day: self.read_text(f"{newest[day].partition_dir(table, day)}/manifest.json"), sorted(days)
                )
            )
        return {
            day: self._as_staged(newest[day], table, day, text)
            for day, text in zip(sorted(days), texts, strict=True)
            if text is not None
        }

    def _as_staged(self, work: Try, table: str, dt: str, text: str) -> Staged:
        where = f"{self.root}/{work.partition_dir(table, dt)}/manifest.json"
        return Staged(
            work, Manifest.from_json(text, where, "run the stage that builds it again with the same --attempt")
        )

    def staged_days(self, attempt: str, table: str) -> list[str]:
        """Return the days of `table` that this attempt has staged completely, oldest first."""
        return list(self.staged_partitions(attempt, table))

    # ---- publication ---------------------------------------------------------------------------------------------

    def publish(self, attempt: str, table: str, dt: str) -> Manifest:
        """Make a staged partition the current one. Idempotent: a second call finds it published and changes nothing.

        Raises:
            StageError: nothing complete is staged by this attempt, or see `publish_all`.
        """
        staged = self.staged(attempt, table, dt)
        if staged is None:
            current = self.manifest(table, dt)
            if current is not None and current.attempt == attempt:
                with opened(self.fs, self.warehouse, f"{self.root}/{pointer_path(table, dt)}"):
                    self._settle(table, dt)  # a publication may have been cut short behind its pointer
                return current
            raise StageError(
                f"attempt {attempt} has no completely staged partition dt={dt} of table {table}",
                "run the stage that builds it with the same --attempt first",
            )
        [published] = self.publish_all([staged])
        return published

    def publish_all(
        self, staged: Sequence[Staged], announce: Callable[[Manifest], None] = lambda manifest: None
    ) -> list[Manifest]:
        """Make staged partitions the current ones, in this order, after the bytes of all of them were found to be those
        of their manifests.

        Args:
            announce: called with each as soon as it is published.

        Raises:
            StageError: a file is missing or has other bytes than its manifest says, or somebody published other data
                since the try began: nothing was published then, or not that partition and those after it. What is
                staged stays.
        """
        for one in staged:
            self._require_expected(one, self.manifest(one.manifest.table, one.manifest.dt))
        with ThreadPoolExecutor(REQUESTS) as pool:
            for _ in pool.map(
                lambda one: self._verify(*one), [(one.manifest, file) for one in staged for file in one.manifest.files]
            ):
                pass
        published = []
        for one in staged:
            published.append(self._publish_verified(one))
            announce(published[-1])
        return published

    def _verify(self, manifest: Manifest, file: DataFile) -> None:
        """Compare size and sha256 of a staged file with its manifest.

        Of one that a publication cut short has moved, where it is now.
        """
        where = f"{self.root}/{file.path}"
        info = self.fs.get_file_info(where)
        if info.type != pafs.FileType.File:
            moved = f"{self.root}/{self.published_path(manifest.table, manifest.dt, file)}"
            info = self.fs.get_file_info(moved)
            if info.type != pafs.FileType.File:
                raise self._not_as_judged(
                    f"the staged file {where} of table {manifest.table} dt={manifest.dt} is missing"
                )
            where = moved
        if info.size != file.bytes:
            raise self._not_as_judged(
                f"the file {where} of table {manifest.table} dt={manifest.dt} has {info.size} bytes, its manifest says"
                f" {file.bytes}"
            )
        if (found := sha256_of(self.fs, where)) != file.digest:
            raise self._not_as_judged(
                f"the file {where} of table {manifest.table} dt={manifest.dt} has the sha256 {found[:20]}, its manifest"
                f" says {file.digest[:20]}"
            )

    @staticmethod
    def _not_as_judged(what: str) -> StageError:
        return StageError(
            what,
            "run the stage that builds it with the same --attempt again, then its gate; what was published before is"
            " unchanged",
        )

    def _require_expected(self, staged: Staged, current: Manifest | None) -> None:
        """Compare what is published with what was when the try began. The same data from somebody else is no conflict.

        Raises:
            StageError: they differ.
        """
        name = self.input_name(staged.manifest)
        found, expected = current.data_digest if current else "", staged.work.expected.get(name, "")
        if found in (expected, staged.manifest.data_digest):
            return
        by = (
            f"attempt {current.attempt} published {found[:16]} ({current.rows:,} rows)"
            if current
            else "it was withdrawn"
        )
        raise StageError(
            f"{self.dataset}/{name} changed while attempt {staged.work.attempt} built it from"
            f" {expected[:16] or 'nothing published'}: {by} meanwhile",
            "run the stage that builds it again with the same --attempt, which starts from what is published now, then"
            f" its gate; nothing is lost, what was staged is under {self.root}/{staged.work.folder}",
        )

    def _publish_verified(self, staged: Staged) -> Manifest:
        manifest, table, dt = staged.manifest, staged.manifest.table, staged.manifest.dt
        published = replace(
            manifest, files=tuple(replace(file, path=self.published_path(table, dt, file)) for file in manifest.files)
        )
        text, won = published.to_json(), False
        while not won:
            with opened(self.fs, self.warehouse, f"{self.root}/{pointer_path(table, dt)}") as pointer:
                current = self._as_current(table, dt, pointer.text) if pointer.text is not None else None
                try:
                    self._require_expected(staged, current)
                except StageError:
                    if current is not None:
                        self._settle(table, dt)  # takes out what was placed before the pointer moved
                    raise
                self._place(manifest, published)
                if current is not None:
                    self._remember(current)
                with contextlib.suppress(Moved):  # by somebody else: look again
                    pointer.replace(text)
                    won = True
                    self._settle(table, dt)
        self._drop_staged(
            [work for work in self.tries(manifest.attempt) if work.name <= staged.work.name], [table], [dt]
        )
        return published

    def _place(self, staged: Manifest, published: Manifest) -> None:
        """Bring the staged files to where they are published, to stay, and look that each is there."""
        local = isinstance(self.fs, pafs.LocalFileSystem)
        for file, final in zip(staged.files, published.files, strict=True):
            source, target = f"{self.root}/{file.path}", f"{self.root}/{final.path}"
            folder = target.rsplit("/", 1)[0]
            self._make_dir(folder)
            if self.fs.get_file_info(source).type != pafs.FileType.File:
                continue  # moved by a publication that was cut short, and verified where it is
            if local:
                sync(source)
                os.replace(source, target)
                sync(folder)
            elif self.fs.type_name in OBJECT_STORES:
                self.fs.copy_file(source, target)  # a publisher who loses keeps its staging
            else:
                self.fs.move(source, target)
        for info, final in zip(
            self.fs.get_file_info([f"{self.root}/{file.path}" for file in published.files]),
            published.files,
            strict=True,
        ):
            if info.type != pafs.FileType.File or info.size != final.bytes:
                raise self._not_as_judged(
                    f"the file {info.path} of table {published.table} dt={published.dt} was moved there and is not"
                    " there whole"
                )

    def _settle(self, table: str, dt: str) -> None:
        """Let the partition's folder hold exactly the files of its manifest, so that any engine that reads the folder
        counts right.

        Other files move below `_superseded`, where `read_file` finds them for who holds an older manifest. Where there
        is no lock, another publisher may do the same meanwhile: whoever ends last has looked at the manifest that
        counts.
        """
        current = self.require(table, dt)
        # Behind the pointer, so that a history without a pointer always means a pointer that was lost.
        self._remember(current)
        self._sort_out(current)
        while (after := self.require(table, dt)).files != current.files:
            current = after
            self._sort_out(current)

    def _sort_out(self, current: Manifest) -> None:
        folder = f"{current.table}/dt={current.dt}"
        infos = self.fs.get_file_info(pafs.FileSelector(f"{self.root}/{folder}", recursive=True, allow_not_found=True))
        there = {info.path[len(self.root) + 1 :] for info in infos if info.type == pafs.FileType.File}
        listed = {file.path for file in current.files}
        for path in sorted(there - listed):
            self._make_dir(f"{self.root}/{SUPERSEDED}/{path}".rsplit("/", 1)[0])
            try:
                self.fs.move(f"{self.root}/{path}", f"{self.root}/{SUPERSEDED}/{path}")
            except OSError:
                if self.fs.get_file_info(f"{self.root}/{path}").type == pafs.FileType.File:
                    raise  # else another publisher has moved it
        for path in sorted(
            listed - there
        ):  # taken out by a publisher that lost, or of a manifest that was restored by hand
            if self.fs.get_file_info(f"{self.root}/{SUPERSEDED}/{path}").type == pafs.FileType.File:
                self._make_dir(f"{self.root}/{path}".rsplit("/", 1)[0])
                self.fs.copy_file(f"{self.root}/{SUPERSEDED}/{path}", f"{self.root}/{path}")

    def published_path(self, table: str, dt: str, file: DataFile) -> str:
        """Path below the dataset's folder to which `publish` moves a staged file."""
        return f"{table}/dt={dt}/bucket={file.bucket:03d}/{file.digest[:20]}.parquet"

    def manifest(self, table: str, dt: str) -> Manifest | None:
        """Return the current manifest of a published partition, else None."""
        text = self.read_text(pointer_path(table, dt))
        if text is None and (history := self._history(table, dt)):
            text = self.read_text(
                pointer_path(table, dt)
            )  # published just now: the history is written behind the pointer
            if text is None:
                raise StageError(
                    f"{self.root}/{pointer_path(table, dt)} is gone, yet the partition was published:"
                    f" {self.root}/_manifests/{table}/dt={dt}/history holds {len(history)} manifest(s)",
                    "copy the newest good one of them over it; to withdraw a partition for good, remove its whole"
                    " folder below _manifests",
                )
        return self._as_current(table, dt, text) if text is not None else None

    def manifest_at(self, path: str) -> Manifest:
        """Return a manifest of the history. Raises: StageError: it is gone or damaged."""
        text = self.read_text(path.removeprefix(f"{self.root}/"))
        return Manifest.from_json(text or "", path, "remove it by hand if nobody needs it")

    def _history(self, table: str, dt: str) -> list[str]:
        """Return the paths of every manifest of a partition that was ever published."""
        infos = self.fs.get_file_info(
            pafs.FileSelector(f"{self.root}/_manifests/{table}/dt={dt}/history", allow_not_found=True)
        )
        return [info.path for info in infos if info.base_name.endswith(".json")]

    def _remember(self, manifest: Manifest) -> None:
        """Write a manifest that is published into its partition's history, under a name that nothing else has."""
        text = manifest.to_json()
        own = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = f"{manifest.data_digest}.{manifest.attempt}.{own}.json"
        path = f"_manifests/{manifest.table}/dt={manifest.dt}/history/{name}"
        if self.fs.get_file_info(f"{self.root}/{path}").type != pafs.FileType.File:
            self.write_text(path, text, durable=True)

    def _as_current(self, table: str, dt: str, text: str) -> Manifest:
        where = f"{self.root}/{pointer_path(table, dt)}"
        return Manifest.from_json(
            text, where, f"copy the newest good manifest of {self.root}/_manifests/{table}/dt={dt}/history over it"
        )

    def days(self, table: str) -> list[str]:
        """Return the days of which a partition was ever published, oldest first."""
        infos = self.fs.get_file_info(pafs.FileSelector(f"{self.root}/_manifests/{table}", allow_not_found=True))
        return sorted(info.base_name.removeprefix("dt=") for info in infos if info.type == pafs.FileType.Directory)

    def require(self, table: str, dt: str) -> Manifest:
        """Return the current manifest, or say which stage has to run.

        Raises:
            StageError: the partition is not published.
        """
        manifest = self.manifest(table, dt)
        if manifest is None:
            raise StageError(
                f"partition dt={dt} of {self.dataset}/{table} is not published under {self.warehouse}",
                f"run the stage that builds {table} for {dt} first",
            )
        return manifest

    # ---- reading -------------------------------------------------------------------------------------------------

    def read(
        self,
        manifest: Manifest,
        columns: Sequence[str] | None = None,
        bucket: int | None = None,
        empty: pa.Schema | None = None,
    ) -> pa.Table:
        """Read a staged or published partition, or one bucket of it, in bucket order.

        Args:
            empty: the schema of a partition without files, with the fields that the data set adds; None: the contract
                alone.
        """
        schema = TABLES[manifest.table] if empty is None else empty
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns if name in schema.names])
        files = sorted((f for f in manifest.files if bucket in (None, f.bucket)), key=lambda f: (f.bucket, f.path))
        return self.read_files(files, columns) if files else schema.empty_table()

    def read_files(self, files: Sequence[DataFile], columns: Sequence[str] | None = None) -> pa.Table:
        """Read some files of one table, in this order."""
        return pa.concat_tables([self.read_file(file, columns) for file in files])

    def read_file(self, file: DataFile, columns: Sequence[str] | None = None) -> pa.Table:
        """Read a file where its manifest says, or where publication has moved it. Raises: see `wherever`."""
        names = None if columns is None else list(columns)
        return self.wherever(
            file, lambda path: pq.read_table(path, filesystem=self.fs, partitioning=None, columns=names)
        )

    def open_parquet(self, file: DataFile) -> pq.ParquetFile:
        """Open a file where its manifest says, or where publication has moved it. Raises: see `wherever`."""
        return self.wherever(file, lambda path: pq.ParquetFile(path, filesystem=self.fs))

    def wherever(self, file: DataFile, use: Callable[[str], Found]) -> Found:
        """Return what `use` makes of a file's path in the file system: the manifest's, or, when that counts no more,
        where it was moved.

        Raises:
            StageError: the file is in neither place, or cannot be read.
        """
        try:
            return use(f"{self.root}/{file.path}")
        except OSError as error:
            old = f"{self.root}/{SUPERSEDED}/{file.path}"
            if self.fs.get_file_info(old).type != pafs.FileType.File:
                raise kind_of(error)(
                    f"the file {self.root}/{file.path}, which a manifest lists, cannot be read: {error}",
                    "restore it, or build its partition again with a new attempt and let its gate publish it",
                ) from error
            return use(old)

    def compacted(self, manifests: Sequence[Manifest]) -> list[Manifest]:
        """Return days of `events` in order, with blocks in place of the days that these were made from.

        A block counts only while every day in it is the day that is published now, so that reading it is reading them.
        """
        days = {self.input_name(m): m for m in manifests}
        blocks: dict[str, Manifest] = {}
        inside: set[str] = set()
        for dt in self.days("event_blocks"):
            block = self.manifest("event_blocks", dt)
            if block is None or not block.inputs.keys() <= days.keys() or block.inputs.keys() & inside:
                continue
            if all(days[name].data_digest == digest for name, digest in block.inputs.items()):
                blocks[min(block.inputs)] = block
                inside |= block.inputs.keys()
        return [blocks.get(name, m) for name, m in days.items() if name in blocks or name not in inside]

    def input_name(self, manifest: Manifest) -> str:
        """Name of a partition among another manifest's `inputs`."""
        return f"{manifest.table}/dt={manifest.dt}"


def require_one_day(attempt: str, dt: str, tries: Sequence[Try]) -> None:
    """Raises: StageError: a try of the attempt says that it builds another partition than `dt` ('': none)."""
    if dt and (other := next((work for work in tries if work.dt not in ("", dt)), None)):
        raise StageError(
            f"attempt {attempt} builds dt={other.dt} (by {other.folder}), not dt={dt}",
            "give every day an --attempt of its own",
        )


def sha256_of(fs: pafs.FileSystem, path: str) -> str:
    """Return the sha256 (hex) of a file's bytes, as they lie there: nothing is unpacked.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with fs.open_input_stream(path, compression=None) as stream:
        while block := stream.read(8 << 20):
            digest.update(block)
    return digest.hexdigest()


def pointer_path(table: str, dt: str) -> str:
    """Return the path of a partition's current manifest below the data set's folder."""
    return f"_manifests/{table}/dt={dt}/current.json"


def _leaf_names(schema: pa.Schema) -> list[str]:
    return [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in schema]
