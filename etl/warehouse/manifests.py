"""What one published partition consists of, as JSON that stays readable for years."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from etl.stage.errors import StageError

FORMAT_VERSION = 1  # raised when an older reader would misread a manifest; a new key alone is ignored by it
CHECKSUM = "manifest_sha256"


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
        """Return the manifest with its checksum.

        The data digest covers the files alone, not of counts, inputs and settings.
        """
        content = {**asdict(self), "format_version": FORMAT_VERSION, "rows": self.rows, "data_digest": self.data_digest}
        return json.dumps({**content, CHECKSUM: checksum(content)}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str, where: str, remedy: str) -> Manifest:
        """Read a manifest; keys that this version does not know are ignored.

        Args:
            where, remedy: its path, and what its reader should do when it is damaged.

        Raises:
            StageError: it is empty, cut or garbled, its digest is not that of what it lists, its checksum is not that
                of what it says (manifests of earlier versions have none), or a newer longview wrote it.
        """
        try:
            raw = json.loads(text)
            version = int(raw.get("format_version", 1))  # manifests before the first numbered one are of version 1
        except (ValueError, TypeError, AttributeError) as error:
            what = "is empty" if not text.strip() else f"is cut or garbled: {error}"
            raise StageError(f"the manifest {where} {what}", remedy) from error
        if version > FORMAT_VERSION:
            raise StageError(
                f"the manifest {where} was written by a newer longview: format_version {version}, this one reads up to"
                f" {FORMAT_VERSION}",
                "update longview where this stage runs",
            )
        try:
            files = tuple(DataFile(**_known(DataFile, file)) for file in raw["files"])
            manifest = Manifest(**{**_known(Manifest, raw), "files": files})
            rows, digest = manifest.rows, manifest.data_digest
        except (TypeError, KeyError, AttributeError) as error:
            raise StageError(f"the manifest {where} is garbled: {error}", remedy) from error
        if wrong := [
            name for name in ("counts", "inputs", "settings") if not isinstance(getattr(manifest, name), dict)
        ]:
            raise StageError(
                f"the manifest {where} is garbled: {wrong[0]} is {str(raw[wrong[0]])[:40]!r}, not names with values",
                remedy,
            )
        if (raw.get("rows"), raw.get("data_digest")) != (rows, digest):
            raise StageError(
                f"the manifest {where} says {raw.get('rows')} rows and the data digest {raw.get('data_digest')}, its"
                f" files have {rows} rows and {digest}",
                remedy,
            )
        if CHECKSUM in raw and raw[CHECKSUM] != (found := checksum(raw)):
            raise StageError(
                f"the manifest {where} was changed after it was written: its {CHECKSUM} is {str(raw[CHECKSUM])[:20]},"
                f" what it says has {found[:20]}",
                remedy,
            )
        return manifest


def checksum(content: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of all that a manifest says but its checksum.

    Keys of a later version, too, and whatever the layout of the JSON.
    """
    said = {name: value for name, value in content.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _known(kind: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: raw[name] for name in kind.__dataclass_fields__ if name in raw}  # type: ignore[attr-defined]
