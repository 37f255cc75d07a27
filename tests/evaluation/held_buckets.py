"""Buckets that workers hold until a test lets go: `python -m tests.evaluation.held_buckets WAREHOUSE FOLDER`.

A bucket that is begun is a file in FOLDER; it ends once FOLDER has the file `go`. What each came to is printed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import evaluation.spread
from etl.stage.commands import run_stage
from etl.warehouse.store import TableStore
from evaluation.spread import Bucket, Spread, each_bucket
from tests.training.partitions import DT
from training.scoring import CPU


@dataclass(frozen=True)
class Held:
    folder: str

    def begin(self, device: str) -> Callable[[Bucket], int]:
        folder = Path(self.folder)

        def held(bucket: Bucket) -> int:
            (folder / f"begun-{bucket[0].bucket}-{time.time_ns()}").touch()
            while not (folder / "go").exists():
                time.sleep(0.02)
            return bucket[0].bucket

        return held


def main() -> None:
    warehouse, folder = sys.argv[1:]
    evaluation.spread.REPLACEMENT_SECONDS = 15
    sequences = TableStore(warehouse, "kuairand").require("sequences", DT)
    print("came to", each_bucket(Held(folder), sequences, Spread(2, 2, CPU), "held"))


if __name__ == "__main__":
    from tests.evaluation import held_buckets

    run_stage(held_buckets.main)  # Ray takes classes of a module by their names
