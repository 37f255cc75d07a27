"""Checkpoints of a run: written while steps go on, found again after whatever ended it, refused by any other training.

    <run>/checkpoints/NNNNNNNN-<first half of the sha256 of its bytes>.pt

On any storage a file appears whole, under its digest; two are kept, so that a newest one that was damaged later costs
some steps and not the run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from etl.stage.errors import StageError, first_line
from etl.stage.folder import Folder
from etl.warehouse.store import sha256_of
from training.loop import TrainingState

CHECKPOINTS = "checkpoints"  # their folder in that of the run
NEWEST = 2
FORMAT = "5"
SHOWN_CHARACTERS = 80


@dataclass
class Checkpoint:
    """Where a run of several models stands.

    Attributes:
        done: summaries of the finished models.
        name: the model in training, with its state; None where the next one has not begun.
        file: where it was read; "" if nowhere.
    """

    done: dict[str, dict] = field(default_factory=dict)
    name: str | None = None
    state: TrainingState | None = None
    file: str = ""


class _Damaged(Exception):
    """A checkpoint cannot be read, in words."""


class Checkpoints:
    """The checkpoints of one run, which one process writes.

    Args:
        folder: theirs alone; made when the first is written.
        identity: all that decides the weights, name -> value; a run goes on from no checkpoint that differs in any of
            it.
        every_steps, every_seconds: a checkpoint is due after so many steps, or so many seconds, whichever comes first.
        say: takes each line of progress.
    """

    def __init__(
        self,
        folder: Folder,
        identity: Mapping[str, str],
        every_steps: int,
        every_seconds: float,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.identity, self.say = folder, {"format of checkpoints": FORMAT, **identity}, say
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self._last_step, self._last_time = 0, time.monotonic()
        self._writing: threading.Thread | None = None

    def newest(self) -> Checkpoint:
        """Return where the run stands: the newest checkpoint that is whole; an empty one where there is none.

        Raises:
            StageError: it belongs to another training.
        """
        for name in self._files():
            try:
                return self.read(name)
            except _Damaged as error:
                self.say(
                    f"warning: checkpoint {self.folder.address_of(name)} is damaged, going on from the one before"
                    f" it, if there is one: {error}"
                )
        return Checkpoint()

    def read(self, file: str) -> Checkpoint:
        """Return a checkpoint by its file, an empty one for ""; of its tensors what is looked at is read.

        Raises:
            StageError: it belongs to another training.
        """
        if not file:
            return Checkpoint()
        with self.folder.read_locally(file) as path:  # a store that does not answer is no damage
            try:
                if _digest(path) != path.stem.partition("-")[2]:
                    raise ValueError("its bytes are not those that were written")
                raw = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise _Damaged(first_line(error)) from error
        self._refuse_another(raw["identity"])
        state = TrainingState(**raw["state"]) if raw["state"] is not None else None
        return Checkpoint(raw["done"], raw["name"], state, file)

    def due(self, step: int) -> bool:
        """Say whether a checkpoint is due, and the one before it is written."""
        due = step - self._last_step >= self.every_steps or time.monotonic() - self._last_time >= self.every_seconds
        return due and not (self._writing and self._writing.is_alive())

    def begin(self, step: int, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, the copy of a state, while steps go on."""
        self._last_step, self._last_time = step, time.monotonic()
        self._writing = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint", daemon=True)
        self._writing.start()

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint now."""
        if self._writing:
            self._writing.join()
        self._last_step, self._last_time = 0, time.monotonic()
        self._write(checkpoint)

    def _write(self, checkpoint: Checkpoint) -> None:
        state = vars(checkpoint.state) if checkpoint.state is not None else None
        try:
            files = self._files()
            number = 1 + (int(files[0].partition("-")[0]) if files else 0)
            with self.folder.written(lambda path: f"{number:08d}-{_digest(path)}.pt") as path:
                torch.save(
                    {"identity": self.identity, "done": checkpoint.done, "name": checkpoint.name, "state": state}, path
                )
            for old in self._files()[NEWEST:]:
                self.folder.forget(old)
        except OSError as error:
            self.say(f"warning: no checkpoint could be written, a restart would begin at the one before it: {error}")

    def _files(self) -> list[str]:
        return [name for name in reversed(self.folder.names()) if fnmatch(name, "[0-9]*-*.pt")]

    def _refuse_another(self, theirs: Mapping[str, str]) -> None:
        differing = sorted(name for name in {*theirs, *self.identity} if theirs.get(name) != self.identity.get(name))
        if differing:
            lines = [
                f"{name}: {_shown(theirs.get(name))} there, {_shown(self.identity.get(name))} now" for name in differing
            ]
            raise StageError(
                f"{self.folder.address} holds checkpoints of another training:\n    " + "\n    ".join(lines),
                "run it as it was, or train under another --attempt",
            )


def _shown(value: str | None) -> str:
    if value is None:
        return "missing"
    return value if len(value) <= SHOWN_CHARACTERS else value[:SHOWN_CHARACTERS] + "..."


def _digest(path: Path) -> str:
    return sha256_of(pafs.LocalFileSystem(), str(path))[:32]


def flat(tree: Any, name: str = "") -> dict[str, str]:
    """Return the leaves of nested dicts by their dotted names."""
    if not isinstance(tree, dict):
        return {name: repr(tree)}
    return {
        key: value
        for part, branch in tree.items()
        for key, value in flat(branch, f"{name}.{part}" if name else str(part)).items()
    }
