"""A folder of files on any file system that Arrow reads: a local path, S3, Google's or Azure's storage."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from etl.stage.errors import StageError, kind_of
from etl.stage.local_files import sync
from etl.stage.uris import below, without_secrets

OBJECT_STORES = ("s3", "gcs", "abfs")  # names of Arrow's file systems that have keys, no folders


class Folder:
    """A folder, which its first file makes.

    Args:
        address: a path or a URI.
        option: which gave it, for messages.

    Attributes:
        address: as given, a path made absolute: executors and workers of a cluster work in folders of their own.
        fs, root: Arrow's file system, and the folder's path in it.

    Raises:
        StageError: it cannot be opened; from any method OSError: the store refuses or does not answer.
    """

    def __init__(self, address: str, option: str) -> None:
        self.address = without_secrets(address, option) if "://" in address else os.path.abspath(address)
        self.option = option
        try:
            self.fs, root = pafs.FileSystem.from_uri(self.address)
        except (pa.ArrowInvalid, OSError) as error:
            raise kind_of(error)(
                f"{self.address}, which {option} gives, cannot be opened: {error}",
                "give a path, or a URI such as s3://bucket/folder?region=eu-central-1",
            ) from error
        self.root = root.rstrip("/")

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def below(self, name: str) -> Folder:
        """Return a folder in this one."""
        return Folder(self.address_of(name), self.option)

    def address_of(self, name: str) -> str:
        """Return the address of a file or folder in this one."""
        return below(self.address, name) if name else self.address

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder is there; without a name: this folder."""
        return self._info(name).type != pafs.FileType.NotFound

    def names(self, name: str = "") -> list[str]:
        """Return the names of what lies directly in this folder or in one of it, in order."""
        infos = self.fs.get_file_info(pafs.FileSelector(self._path(name), allow_not_found=True))
        return sorted(info.base_name for info in infos)

    def files(self, name: str = "") -> list[pafs.FileInfo]:
        """Return every file in this folder or in one of it, at any depth."""
        infos = self.fs.get_file_info(pafs.FileSelector(self._path(name), recursive=True, allow_not_found=True))
        return [info for info in infos if info.type == pafs.FileType.File]

    # ---- small files ---------------------------------------------------------------------------------------------

    def write_bytes(self, path: str, body: pa.Buffer | bytes, durable: bool = False) -> None:
        """Write one small file; a reader sees the old one or the whole new one.

        Args:
            durable: on a local disk, wait until it would survive a loss of power.
        """
        full = self._path(path)
        self._make_dir(full.rsplit("/", 1)[0])
        # Local file systems rename, object stores show an object only when complete.
        target = f"{full}.{uuid.uuid4().hex}.tmp" if self.is_local else full
        with self.fs.open_output_stream(target) as stream:
            stream.write(body)
        if self.is_local:
            if durable:
                sync(target)
            os.replace(target, full)
            if durable:
                sync(full.rsplit("/", 1)[0])

    def write_text(self, path: str, text: str, durable: bool = False) -> None:
        self.write_bytes(path, text.encode(errors="backslashreplace"), durable)

    def read_text(self, path: str) -> str | None:
        """Return a small file, None where there is none."""
        if self._info(path).type != pafs.FileType.File:
            return None
        with self.fs.open_input_stream(self._path(path), compression=None) as stream:
            return stream.read().decode("utf-8", "replace")

    def bytes_of(self, path: str) -> int:
        """Return the size of a file, 0 where there is none."""
        return self._info(path).size or 0

    def append_text(self, path: str, text: str) -> None:
        """Add to a small file that nobody else writes; an object is replaced by a longer one."""
        if self.is_local:
            self._make_dir(self._path(path).rsplit("/", 1)[0])
            with Path(self._path(path)).open("a") as stream:
                stream.write(text)
        else:
            self.write_text(path, (self.read_text(path) or "") + text)

    def forget(self, path: str) -> None:
        """Drop a file, where it is there."""
        if self._info(path).type == pafs.FileType.File:
            self.fs.delete_file(self._path(path))

    # ---- files of libraries that know paths alone ------------------------------------------------------------------

    @contextmanager
    def written(self, name: str | Callable[[Path], str]) -> Iterator[Path]:
        """Yield a local path; the file that the body writes there then stands here, whole and to stay.

        Args:
            name: of the file, or what names it by what was written.
        """
        ending = name if isinstance(name, str) else "tmp"
        with _made(Path(self.root)) if self.is_local else _scratch() as folder:
            path = folder / (f".{os.getpid()}.{ending}" if self.is_local else ending)
            try:
                yield path
                full = self._path(name if isinstance(name, str) else name(path))
                if self.is_local:
                    sync(path)
                    os.replace(path, full)
                    sync(folder)
                else:
                    pafs.copy_files(str(path), full, pafs.LocalFileSystem(), self.fs)
            finally:
                path.unlink(missing_ok=True)

    @contextmanager
    def written_folder(self, name: str) -> Iterator[Path]:
        """Yield a local folder; what the body writes there then stands in a folder of this one, file by file."""
        if self.is_local:
            yield Path(self._path(name))
            return
        with _scratch() as folder:
            yield folder
            pafs.copy_files(str(folder), self._path(name), pafs.LocalFileSystem(), self.fs)

    @contextmanager
    def read_locally(self, name: str = "") -> Iterator[Path]:
        """Yield the local path of a file or folder: its own, or that of a copy that goes with the body.

        Raises:
            StageError: there is none.
        """
        if self.is_local:
            yield Path(self._path(name))
            return
        info = self._info(name)
        if info.type == pafs.FileType.NotFound:
            raise StageError(f"{self.address_of(name)} is missing", "run the stage that writes it")
        with _scratch() as folder:
            path = folder / info.base_name
            if info.type == pafs.FileType.Directory:
                path.mkdir()
            pafs.copy_files(info.path, str(path), self.fs, pafs.LocalFileSystem())
            yield path

    def _info(self, name: str) -> pafs.FileInfo:
        return self.fs.get_file_info(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _make_dir(self, path: str) -> None:
        """Make a folder where there are folders; an object store would take a request for each level of it."""
        if self.fs.type_name not in OBJECT_STORES:
            self.fs.create_dir(path, recursive=True)


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="longview-") as folder:
        yield Path(folder)


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
