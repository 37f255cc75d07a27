"""How users are spread over the buckets of a day, and how days that are cut into different buckets are read
together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from etl.stage.errors import StageError
from etl.warehouse.store import DataFile, Manifest, TableStore

MAX_BUCKETS = 4_096


def splitmix64(user_id: np.ndarray) -> np.ndarray:
    """Mix ids so that every bit of the result hangs on every bit of the id (splitmix64's finaliser), uint64."""
    mixed = user_id.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _product(user_id: np.ndarray) -> np.ndarray:
    # Ids whose low bits are equal fall into few buckets: only to read days that were cut by it.
    return (user_id.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(33)


HASHES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"splitmix64": splitmix64, "product": _product}


@dataclass(frozen=True)
class Layout:
    """How a day is cut: a user lies in the bucket `hash(user_id) mod buckets`."""

    buckets: int
    hash: str = "splitmix64"

    @staticmethod
    def of(manifest: Manifest) -> Layout:
        """Return the layout of a published day or block.

        Raises:
            StageError: its manifest does not say it, or names a hash of a later version.
        """
        buckets, name = manifest.settings.get("buckets"), str(manifest.settings.get("bucket_hash", "product"))
        if not str(buckets).isdecimal() or not 1 <= int(str(buckets)) <= MAX_BUCKETS or name not in HASHES:
            raise StageError(
                f"the manifest of {manifest.dataset}/{manifest.table} dt={manifest.dt} has {buckets!r} buckets by the"
                f" hash {name!r}; known are 1 to {MAX_BUCKETS} by {', '.join(HASHES)}",
                f"copy the newest good manifest of _manifests/{manifest.table}/dt={manifest.dt}/history over its"
                " current.json, or update longview",
            )
        return Layout(int(str(buckets)), name)

    def settings(self) -> dict[str, str | int]:
        """Return what a manifest says of it."""
        return {"buckets": self.buckets, "bucket_hash": self.hash}

    def bucket_of(self, user_id: np.ndarray) -> np.ndarray:
        """Return the bucket of each user: of the id alone, stable over versions and machines, int32."""
        return (HASHES[self.hash](user_id) % np.uint64(self.buckets)).astype(np.int32)

    def nested_in(self, other: Layout) -> int:
        """Return the number m with: a user in bucket a here and b there has a = b modulo m; 1 says nothing."""
        return math.gcd(self.buckets, other.buckets) if self.hash == other.hash else 1


@dataclass(frozen=True)
class Part:
    """A file that holds users of a bucket; `mixed`: others, too."""

    file: DataFile
    mixed: bool


def common_layout(days: Sequence[Manifest]) -> Layout:
    """Return the layout in which the most rows of some days lie: the fewest bytes are read twice by it."""
    rows: Counter[Layout] = Counter()
    for day in days:
        if day.rows:
            rows[Layout.of(day)] += day.rows
    return max(rows, key=lambda layout: (rows[layout], layout.buckets, layout.hash), default=Layout(1))


def parts_by_bucket(manifests: Sequence[Manifest], layout: Layout) -> dict[int, list[Part]]:
    """Return what holds the users of each bucket of a layout, in the manifests' order.

    Buckets that nothing holds are left out.
    """
    parts: dict[int, list[Part]] = {}
    for manifest in manifests:
        if not manifest.files:
            continue
        same = Layout.of(manifest).nested_in(layout)
        groups = files_by_remainder(manifest, same)
        for bucket in range(layout.buckets):
            if found := groups.get(bucket % same):
                parts.setdefault(bucket, []).extend(Part(file, same < layout.buckets) for file in found)
    return parts


def files_by_remainder(manifest: Manifest, modulus: int) -> dict[int, list[DataFile]]:
    """Return the files of a day by their bucket modulo a number, each group in the order of buckets."""
    groups: dict[int, list[DataFile]] = {}
    for file in sorted(manifest.files, key=lambda f: f.bucket):
        groups.setdefault(file.bucket % modulus, []).append(file)
    return groups


def read_bucket(
    store: TableStore, parts: Sequence[Part], bucket: int, layout: Layout, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read the rows of one bucket, in the order of its parts."""
    tables = []
    for part in parts:
        wanted = None if columns is None else list(dict.fromkeys([*columns, *(["user_id"] if part.mixed else [])]))
        rows = store.read_file(part.file, wanted)
        if part.mixed:
            rows = rows.filter(pa.array(layout.bucket_of(rows["user_id"].to_numpy()) == bucket))
        tables.append(rows if columns is None else rows.select(list(columns)))
    return pa.concat_tables(tables)
