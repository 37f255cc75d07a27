"""Unpacks raw files as they are read, with bounded memory: what a file is compressed with is known by its first bytes.

Its name is no proof: browsers unpack what they save, and tools leave `.zst` on a gzip file. A name that promises a
compression which the bytes do not show is damage.
"""

from __future__ import annotations

import io
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator

import pyarrow as pa

BLOCK_BYTES = 4 << 20  # of text that is handed on at once, at least
PIECE_BYTES = 4 << 10  # what one call unpacks is lost when it fails, so little must hang on one call
HEAD_BYTES = 512

_MAGIC = {
    "gzip": b"\x1f\x8b",
    "zstd": b"\x28\xb5\x2f\xfd",
    "xz": b"\xfd7zXZ\x00",
    "zip": b"PK\x03\x04",
    "lz4": b"\x04\x22\x4d\x18",
}
_BZ2_BLOCKS = (b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90")  # a block, or the end of an empty stream
_SUFFIXES = {
    ".gz": "gzip",
    ".gzip": "gzip",
    ".zst": "zstd",
    ".zstd": "zstd",
    ".bz2": "bz2",
    ".xz": "xz",
    ".zip": "zip",
    ".lz4": "lz4",
}
_FOREIGN = (
    (b"PAR1", "a Parquet file", "set logs.format: parquet"),
    (b"\xff\xfe", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it, or pack it as .zst or .gz"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it, or pack it as .zst or .gz"),
    (b"\x1f\x9d", "packed by compress (.Z)", "unpack it, or pack it as .zst or .gz"),
    (b"Obj\x01", "an Avro file", "write it as Parquet or CSV"),
    (b"SQLite format 3\x00", "a SQLite database", "write its table as Parquet or CSV"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel file", "save it as CSV"),
)

BREAKS = frozenset(f"{how}_{kind}" for how in ("truncated", "broken") for kind in (*_MAGIC, "bz2"))
"""Codes of the refused row that stands for everything behind the place where an archive breaks."""


class DamagedError(Exception):
    """An archive cannot be unpacked further.

    Attributes:
        code: of `BREAKS`.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


def promised_compression(name: str) -> str | None:
    """Return the compression that a file's name promises."""
    return next((kind for suffix, kind in _SUFFIXES.items() if name.lower().endswith(suffix)), None)


def without_suffix(name: str) -> str:
    """Return a file's name without the ending of its compression."""
    return next((name[: -len(suffix)] for suffix in _SUFFIXES if name.lower().endswith(suffix)), name)


def compression_of(head: bytes) -> str | None:
    """Return what a file is compressed with by its first bytes, None when it is not."""
    if head.startswith(b"BZh") and head[4:10] in _BZ2_BLOCKS:
        return "bz2"
    return next((kind for kind, magic in _MAGIC.items() if head.startswith(magic)), None)


def foreign_kind(head: bytes) -> tuple[str, str] | None:
    """Return what a file is when it is no text at all, and the way out.

    None for text. `head`: its first bytes, unpacked.
    """
    if head[257:262] == b"ustar":
        return "a tar archive of files", "unpack it into the raw folder"
    return next(((kind, remedy) for magic, kind, remedy in _FOREIGN if head.startswith(magic)), None)


def unpacked(file: pa.NativeFile, kind: str | None, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yield the text of a file from its start, in blocks of about `block_bytes`.

    Raises:
        DamagedError: after everything before the damage was yielded.
    """
    if kind is None:
        while block := file.read(block_bytes):
            yield block
        return
    pieces, size = [], 0
    damage: DamagedError | None = None
    try:
        for piece in _PIECES[kind](file, kind):
            pieces.append(piece)
            size += len(piece)
            if size >= block_bytes:
                yield b"".join(pieces)
                pieces, size = [], 0
    except EOFError as error:
        damage = DamagedError(f"truncated_{kind}", str(error) or "the archive breaks off")
    except (OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        damage = DamagedError(f"{'truncated' if 'Truncated' in str(error) else 'broken'}_{kind}", str(error))
    if pieces:
        yield b"".join(pieces)
    if damage is not None:
        raise damage


def _gzip(file: pa.NativeFile, kind: str) -> Iterator[bytes]:
    inflate = zlib.decompressobj(wbits=31)
    while block := file.read(PIECE_BYTES):
        while block:
            if inflate.eof:
                block = block.lstrip(b"\x00")  # padding behind a member
                if not block:
                    break
                inflate = zlib.decompressobj(wbits=31)
            yield inflate.decompress(block)
            block = inflate.unused_data
    if not inflate.eof:
        raise EOFError


def _xz(file: pa.NativeFile, kind: str) -> Iterator[bytes]:
    inflate = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    while block := file.read(PIECE_BYTES):
        while block:
            if inflate.eof:
                block = block.lstrip(b"\x00")  # padding between streams
                if not block:
                    break
                inflate = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            yield inflate.decompress(block, BLOCK_BYTES)
            while not inflate.eof and not inflate.needs_input:
                yield inflate.decompress(b"", BLOCK_BYTES)
            block = inflate.unused_data if inflate.eof else b""
    if not inflate.eof:
        raise EOFError


def _arrow(file: pa.NativeFile, kind: str) -> Iterator[bytes]:
    with pa.CompressedInputStream(file, kind) as stream:
        while piece := stream.read(PIECE_BYTES):
            yield piece


def _zip(file: pa.NativeFile, kind: str) -> Iterator[bytes]:
    with zipfile.ZipFile(io.BufferedReader(file, BLOCK_BYTES)) as archive:  # type: ignore[type-var]
        # macOS adds a folder of its own beside what was packed.
        members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
        if len(members) != 1:
            names = ", ".join(m.filename for m in members[:3])
            raise zipfile.BadZipFile(
                f"the archive holds {len(members)} files ({names}): only archives of one file are read; unpack it"
            )
        with archive.open(members[0]) as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece


_PIECES: dict[str, Callable[[pa.NativeFile, str], Iterator[bytes]]] = {
    "gzip": _gzip,
    "xz": _xz,
    "zip": _zip,
    "zstd": _arrow,
    "bz2": _arrow,
    "lz4": _arrow,
}
