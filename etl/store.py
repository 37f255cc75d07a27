"""Where tables live and how a partition becomes visible: write under an attempt's staging, audit, publish one manifest.

    <warehouse>/<dataset>/_staging/<attempt>/<table>/dt=D/bucket=NNN/part.parquet     written by a stage
    <warehouse>/<dataset>/_staging/<attempt>/<table>/dt=D/manifest.json               written last by the same stage
    <warehouse>/<dataset>/<table>/dt=D/bucket=NNN/<content digest>.parquet            moved here by `publish`
    <warehouse>/<dataset>/_manifests/<table>/dt=D/<data digest>.json                  every manifest ever published
    <warehouse>/<dataset>/_manifests/<table>/dt=D/current.json                        the one that readers follow

Readers read what the current manifest lists and nothing else. File names are content digests, so publishing the same
data twice changes nothing, and files of the manifest that a reader holds are never overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from etl.errors import StageError
from etl.schemas import TABLES, table_schema
from etl.uris import without_secrets

ROW_GROUP_ROWS = 1 << 20
OBJECT_STORES = ("s3", "gcs", "abfs")  # names of Arrow's file systems that have keys, no folders


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a partition.

    Attributes:
        bucket: hash bucket of its users, 0 for tables without buckets.
        rows: rows in the file.
        bytes: size of the file.
        digest: sha256 of the file's bytes (hex).
        path: path below the dataset's folder.
    """

    bucket: int
    rows: int
    bytes: int
    digest: str
    path: str


@dataclass(frozen=True)
class Manifest:
    """What one published partition consists of, and what it was made from.

    Attributes:
        counts: reconciliation figures of the stage (`rows_read`, `duplicates`, `quarantined`, ...).
        inputs: name -> digest of everything that was read: raw files, or `table/dt=D` -> data digest.
        settings: the settings of the stage that shaped the data.
    """

    dataset: str
    table: str
    dt: str
    attempt: str
    schema: str
    code_version: str
    files: tuple[DataFile, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def data_digest(self) -> str:
        """The snapshot id: a function of table, day, schema and file contents, of nothing else."""
        parts = [self.table, self.dt, self.schema]
        parts += [f"{f.bucket}:{f.rows}:{f.digest}" for f in sorted(self.files, key=lambda f: (f.bucket, f.digest))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "rows": self.rows, "data_digest": self.data_digest}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Manifest:
        raw = json.loads(text)
        raw.pop("rows"), raw.pop("data_digest")
        raw["files"] = tuple(DataFile(**file) for file in raw["files"])
        return Manifest(**raw)


def code_version() -> str:
    """Return the git commit of the running code (`LONGVIEW_CODE_VERSION` wins, for images without git)."""
    import subprocess

    if version := os.environ.get("LONGVIEW_CODE_VERSION"):
        return version
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


class TableStore:
    """All tables of one data set below one warehouse root (a local path or any URI that Arrow reads)."""

    def __init__(self, warehouse: str, dataset: str) -> None:
        # Absolute: the executors of a cluster work in folders of their own.
        self.warehouse = without_secrets(warehouse, "--warehouse") if "://" in warehouse else os.path.abspath(warehouse)
        try:
            self.fs, root = pafs.FileSystem.from_uri(self.warehouse)
        except (pa.ArrowInvalid, OSError) as error:
            raise StageError(f"the warehouse {warehouse} cannot be opened: {error}",
                             "give a path, or a URI such as s3://bucket/folder?region=eu-central-1") from error
        self.root = f"{root.rstrip('/')}/{dataset}"
        self.dataset = dataset

    # ---- staging -------------------------------------------------------------------------------------------------

    def staging_dir(self, attempt: str, table: str, dt: str) -> str:
        """Path of a staged partition below the dataset's folder."""
        return f"_staging/{attempt}/{table}/dt={dt}"

    def clear_staging(self, attempt: str, table: str, dt: str | None = None) -> None:
        """Drop what an earlier try of the same attempt left of a day, or of every day of `table`."""
        path = f"{self.root}/" + (f"_staging/{attempt}/{table}" if dt is None else self.staging_dir(attempt, table, dt))
        if self.fs.get_file_info(path).type != pafs.FileType.NotFound:
            self.fs.delete_dir(path)

    def write_file(self, attempt: str, table: str, dt: str, bucket: int, rows: pa.Table) -> DataFile:
        """Write one bucket of a staged partition (zstd, explicit schema, deterministic bytes)."""
        schema = table_schema(table, rows.schema)
        rows = rows.select(schema.names).cast(schema).combine_chunks()
        sink = pa.BufferOutputStream()
        # Times and offsets inside lists are sorted: delta encoding stores them in a byte or two.
        delta = [name for name in ("event_time_ms", "history_time_ms.list.element", "target_time_ms.list.element",
                                   "target_history_end.list.element", "user_id", "item_id")
                 if name.split(".")[0] in schema.names]
        encodings = {name: "DELTA_BINARY_PACKED" for name in delta}
        dictionary = [leaf for leaf in _leaf_names(schema) if leaf not in encodings]
        pq.write_table(rows, sink, compression="zstd", compression_level=3, row_group_size=ROW_GROUP_ROWS,
                       use_dictionary=dictionary, column_encoding=encodings)
        body = sink.getvalue()
        path = f"{self.staging_dir(attempt, table, dt)}/bucket={bucket:03d}/part.parquet"
        self.write_bytes(path, body)
        return DataFile(bucket, rows.num_rows, body.size, hashlib.sha256(body).hexdigest(), path)

    def write_staged_manifest(self, manifest: Manifest) -> None:
        """Write the manifest of a staged partition; the last act of the stage that built it."""
        self.write_text(f"{self.staging_dir(manifest.attempt, manifest.table, manifest.dt)}/manifest.json", manifest.to_json())

    def staged_manifest(self, attempt: str, table: str, dt: str) -> Manifest | None:
        """Return the manifest of a completely staged partition, else None."""
        text = self.read_text(f"{self.staging_dir(attempt, table, dt)}/manifest.json")
        return Manifest.from_json(text) if text is not None else None

    def staged_days(self, attempt: str, table: str) -> list[str]:
        """Return the days of `table` that this attempt has staged completely, oldest first."""
        base = f"{self.root}/_staging/{attempt}/{table}"
        infos = self.fs.get_file_info(pafs.FileSelector(base, allow_not_found=True))
        days = sorted(info.base_name.removeprefix("dt=") for info in infos if info.type == pafs.FileType.Directory)
        return [day for day in days if self.staged_manifest(attempt, table, day) is not None]

    # ---- publication ---------------------------------------------------------------------------------------------

    def publish(self, attempt: str, table: str, dt: str) -> Manifest:
        """Make a staged partition the current one. Idempotent: a second call finds it published and changes nothing.

        Raises:
            StageError: nothing complete is staged by this attempt.
        """
        staged = self.staged_manifest(attempt, table, dt)
        if staged is None:
            current = self.manifest(table, dt)
            if current is not None and current.attempt == attempt:
                return current
            raise StageError(f"attempt {attempt} has no completely staged partition dt={dt} of table {table}",
                             "run the stage that builds it with the same --attempt first")
        files = []
        for file in staged.files:
            final = self.published_path(table, dt, file)
            source = f"{self.root}/{file.path}"
            self._make_dir(f"{self.root}/{table}/dt={dt}/bucket={file.bucket:03d}")
            if self.fs.get_file_info(source).type == pafs.FileType.File:
                self.fs.move(source, f"{self.root}/{final}")
            files.append(DataFile(file.bucket, file.rows, file.bytes, file.digest, final))
        published = Manifest(**{**_shallow(staged), "files": tuple(files)})
        folder = f"_manifests/{table}/dt={dt}"
        self.write_text(f"{folder}/{published.data_digest}.json", published.to_json())
        self.write_text(f"{folder}/current.json", published.to_json())
        self.clear_staging(attempt, table, dt)
        return published

    def published_path(self, table: str, dt: str, file: DataFile) -> str:
        """Path below the dataset's folder to which `publish` moves a staged file."""
        return f"{table}/dt={dt}/bucket={file.bucket:03d}/{file.digest[:20]}.parquet"

    def manifest(self, table: str, dt: str) -> Manifest | None:
        """Return the current manifest of a published partition, else None."""
        text = self.read_text(f"_manifests/{table}/dt={dt}/current.json")
        return Manifest.from_json(text) if text is not None else None

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
            raise StageError(f"partition dt={dt} of {self.dataset}/{table} is not published under {self.warehouse}",
                             f"run the stage that builds {table} for {dt} first")
        return manifest

    # ---- reading -------------------------------------------------------------------------------------------------

    def read(self, manifest: Manifest, columns: Sequence[str] | None = None, bucket: int | None = None, empty: pa.Schema | None = None) -> pa.Table:
        """Read a staged or published partition, or one bucket of it, in bucket order.

        Args:
            empty: the schema of a partition without files, with the fields that the data set adds; None: the contract alone.
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
        return pq.read_table(f"{self.root}/{file.path}", filesystem=self.fs, partitioning=None,
                             columns=None if columns is None else list(columns))

    def content_digest(self, file: DataFile) -> str:
        """Return the sha256 (hex) of a file's bytes as they are now; '' where it is gone."""
        try:
            return sha256_of(self.fs, f"{self.root}/{file.path}")
        except OSError:
            return ""

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

    @staticmethod
    def files_by_bucket(manifests: Sequence[Manifest]) -> dict[int, list[DataFile]]:
        """Return the files of each bucket, in the manifests' order."""
        files: dict[int, list[DataFile]] = {}
        for manifest in manifests:
            for file in manifest.files:
                files.setdefault(file.bucket, []).append(file)
        return files

    def input_name(self, manifest: Manifest) -> str:
        """Name of a partition among another manifest's `inputs`."""
        return f"{manifest.table}/dt={manifest.dt}"

    # ---- small files ---------------------------------------------------------------------------------------------

    def write_bytes(self, path: str, body: pa.Buffer | bytes) -> None:
        """Write one small file below the data set's folder; a reader sees the old one or the whole new one."""
        full = f"{self.root}/{path}"
        self._make_dir(full.rsplit("/", 1)[0])
        # Local file systems rename, object stores show an object only when complete.
        local = isinstance(self.fs, pafs.LocalFileSystem)
        target = f"{full}.{uuid.uuid4().hex}.tmp" if local else full
        with self.fs.open_output_stream(target) as stream:
            stream.write(body)
        if local:
            os.replace(target, full)

    def _make_dir(self, path: str) -> None:
        """Make a folder where there are folders; an object store would take a request for each level of it."""
        if self.fs.type_name not in OBJECT_STORES:
            self.fs.create_dir(path, recursive=True)

    def write_text(self, path: str, text: str) -> None:
        self.write_bytes(path, text.encode())

    def read_text(self, path: str) -> str | None:
        """Return a small file below the data set's folder, None where there is none."""
        full = f"{self.root}/{path}"
        if self.fs.get_file_info(full).type != pafs.FileType.File:
            return None
        with self.fs.open_input_stream(full) as stream:
            return stream.read().decode()


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


def _shallow(manifest: Manifest) -> dict:
    return {name: getattr(manifest, name) for name in manifest.__dataclass_fields__}


def _leaf_names(schema: pa.Schema) -> list[str]:
    return [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in schema]
