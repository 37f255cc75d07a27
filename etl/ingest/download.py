"""`make data`: brings the published files of a data set into its raw folder.

Archives come into `archives/` below that folder, a `.part` file until they are whole and checked, with what the server
said about them in a `.json` next to them; so a later call goes on where an earlier one was cut off. Their members are
unpacked there too, and renamed into the raw folder only when every archive has been read to its end. `DOWNLOADED.json`
is written
last: where it stands and its files are as it says, there is nothing to do. `docs/downloads.md` has more.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dtm
import fcntl
import fnmatch
import functools
import gzip
import hashlib
import http.client
import json
import os
import posixpath
import re
import shutil
import ssl
import stat
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tqdm import tqdm

from etl.datasets.definition import (
    SIMULATED_MARKER,
    Archive,
    DatasetDefinition,
    Download,
    built_in_names,
    dataset,
    definition_name,
)
from etl.ingest.raw import RawLocation
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError

MARKER = "DOWNLOADED.json"
ARCHIVES = "archives"  # below the raw folder, where no glob of raw files looks
WORK = ".unpacked"  # below ARCHIVES; no archive has a name with a dot before it
CHUNK = 1 << 20
UNPACKED_PER_BYTE = (
    3  # a guess before an archive is there; the members that are used: KuaiRand-1K 1.1, -27K 2.6, -Pure 4
)
TIMEOUT_SECONDS = 60
FIRST_TRIES, TRIES = 3, 6  # to reach the server at all; in a row without a new byte
BACKOFF_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 300.0
RESTARTS = 3  # from the first byte, because the server cannot resume or the file has changed
LOG_EVERY_SECONDS = 5.0
PASSING = (408, 425, 429, 500, 502, 503, 504)  # worth another try
HEAD_NOT_SERVED = (400, 403, 405, 501)
TARS, ZIPS, UNKNOWN_KINDS = (".tar.gz", ".tgz", ".tar"), (".zip",), (".7z", ".rar", ".bz2", ".xz", ".zst")
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
)


class _Lost(Exception):
    """The connection or the server failed in a way that may pass."""

    def __init__(self, why: str, wait_seconds: float = 0.0) -> None:
        super().__init__(why)
        self.wait_seconds = wait_seconds


class _Refused(Exception):
    """The server answered with a status that another try will not change."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code} {reason}")
        self.code = code


@dataclass(frozen=True)
class Remote:
    """What a server says about a file; `etag` and `last_modified` show whether it is still the same one."""

    size: int | None = None
    etag: str | None = None
    last_modified: str | None = None

    @classmethod
    def of(cls, response: http.client.HTTPResponse) -> Remote:
        length = response.headers.get("Content-Length", "")
        first, total = _content_range(response)
        size = total if total is not None or not length.isdigit() else int(length) + (first or 0)
        return cls(size, response.headers.get("ETag"), response.headers.get("Last-Modified"))

    @property
    def if_range(self) -> str | None:
        """The validator that the standard allows with a Range: a strong ETag, else the time of the last change."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def is_other_than(self, earlier: Remote) -> bool:
        pairs = ((self.size, earlier.size), (self.etag, earlier.etag), (self.last_modified, earlier.last_modified))
        return any(now is not None and then is not None and now != then for now, then in pairs)


class Progress:
    """How far a long step is: a bar where a terminal shows stderr, else a line every few seconds."""

    def __init__(self, label: str, total: int | None, start: int = 0) -> None:
        self.label, self.total, self.position, self.start = label, total, start, start
        self.began = self.logged_at = time.monotonic()
        # disable=None: no bar where stderr is no terminal.
        self.bar = tqdm(desc=label, total=total, initial=start, unit="B", unit_scale=True, leave=False, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        self.position += count
        self.bar.update(count)
        if self.bar.disable and time.monotonic() - self.logged_at >= LOG_EVERY_SECONDS:
            self.logged_at = time.monotonic()
            log(f"{self.label}  {self._so_far()}")

    def _so_far(self) -> str:
        rate = (self.position - self.start) / max(time.monotonic() - self.began, 1e-3)
        if not self.total:
            return f"{_size(self.position)}, {_size(rate)}/s"
        left = (self.total - self.position) / max(rate, 1.0)
        return (
            f"{100 * self.position // self.total:3d} %  {_size(self.position)} of {_size(self.total)}, {_size(rate)}/s,"
            f" about {_duration(left)} left"
        )


@dataclass(frozen=True)
class Target:
    """One archive of a definition and its places on the disk."""

    archive: Archive
    folder: Path

    @property
    def name(self) -> str:
        return posixpath.basename(urllib.parse.unquote(urllib.parse.urlsplit(self.archive.url).path))

    @property
    def whole(self) -> Path:
        """The archive once it is whole and checked, or put there by hand."""
        return self.folder / self.name

    @property
    def part(self) -> Path:
        return self.folder / f"{self.name}.part"

    @property
    def notes(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def bad(self) -> Path:
        return self.folder / f"{self.name}.bad"

    @property
    def packed(self) -> bool:
        return self.name.endswith((*TARS, *ZIPS))

    def noted(self) -> dict[str, Any]:
        """Return what an earlier call wrote down about this URL, or nothing."""
        notes = _json(self.notes)
        return notes if notes.get("url") == self.archive.url else {}

    def earlier(self) -> Remote:
        """Return what the server said when the bytes of `part` came."""
        notes = self.noted()
        return Remote(notes.get("size"), notes.get("etag"), notes.get("last_modified"))

    def here(self) -> bool:
        """Whether the archive needs no download: whole by an earlier call, or put there by hand."""
        if not self.whole.is_file():
            return False
        if not self.notes.exists():
            return True
        md5 = self.noted().get("md5")
        return md5 is not None and md5 == (self.archive.md5 or md5)

    def at_hand(self) -> int:
        """Return the bytes that a download need not ask for."""
        return self.part.stat().st_size if self.part.exists() and self.noted() else 0


def download(definition: DatasetDefinition, to: Path, *, dry_run: bool = False, keep_archives: bool = False) -> None:
    """Bring the files of a data set into a folder; nothing is done where they are there already.

    Args:
        to: the raw folder.
        dry_run: say what would be done, write nothing.
        keep_archives: leave the archives in `archives/`.

    Raises:
        StageError: it cannot be had, is damaged, is not what the definition says, or the disk has no room for it.
    """
    source = definition.download
    print(
        definition.title,
        *([f"  licence  {source.licence}", f"  page     {source.page}"] if source else []),
        f"  folder   {to}",
        sep="\n",
        flush=True,
    )
    if source is None or not source.archives:
        if there := _logs_in(to, definition):
            return log(f"nothing to do: {', '.join(there)} {'is' if len(there) == 1 else 'are'} there")
        raise _by_hand(definition, to)
    targets = _targets(definition, source, to)
    _check_folder(definition, to)
    if _finished(definition, to):
        return
    if dry_run:
        _say_what_would_come(targets, source.page, to)
        return
    (to / ARCHIVES).mkdir(parents=True, exist_ok=True)
    with _locked(to):
        if _finished(definition, to):  # by a call that held the folder until now
            return
        _check_all_room(targets, _sizes(targets, source.page), to)
        files = _fetch_and_publish(definition, source, targets, to)
        _remove_archives([target for target in targets if not (keep_archives and target.packed)], to)
    log(f"{files} files are in {to}")


def _say_what_would_come(targets: list[Target], page: str, to: Path) -> None:
    _check_all_room(targets, _sizes(targets, page), to)
    for target in targets:
        log(f"would {'unpack' if target.packed else 'take'} the files that match {', '.join(target.archive.members)}")
    log("dry run: nothing was written")


def _fetch_and_publish(definition: DatasetDefinition, source: Download, targets: list[Target], to: Path) -> int:
    """Fetch and unpack the archives into a folder of work, then move all files at once; return their number."""
    work = to / ARCHIVES / WORK
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        found = []
        staged: dict[str, Path] = {}
        for target in targets:
            md5 = _fetch(target, source.page)
            files = _unpack(target, work, set(staged))
            staged |= files
            found.append(
                {
                    "url": target.archive.url,
                    "bytes": target.whole.stat().st_size,
                    "md5": md5,
                    "last_modified": target.earlier().last_modified,
                    "members": list(target.archive.members),
                    "files": {name: path.stat().st_size for name, path in files.items()},
                }
            )
        _publish(definition, source, to, staged, found)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return len(staged)


def _by_hand(definition: DatasetDefinition, to: Path) -> StageError:
    """Return the error for a data set that no program may fetch."""
    files = (
        f"put the files that match {', '.join(definition.logs.files)} (and"
        f" {', '.join(dict.fromkeys(f.files for f in (*definition.items, *definition.users)))}) into {to}"
    )
    if definition.simulated:
        return StageError(
            f"{definition.name} is simulated: there is nothing to download",
            f"write it: python -m etl.datasets.simulate --out {to}",
        )
    if definition.download is not None:
        return StageError(
            f"{definition.name} cannot be downloaded by a program ({definition.download.licence})",
            f"fetch it from {definition.download.page} and {files}",
        )
    family = {
        name: source
        for name in built_in_names()
        if name.startswith(f"{definition.name}_") and (source := dataset(name).download)
    }
    if family:
        pages = ", ".join(sorted({source.page for source in family.values()}))
        return StageError(
            f"{definition.name} is a family of data sets",
            f"download one of {', '.join(family)} (their page: {pages}), or {files}",
        )
    return StageError(
        f"the definition of {definition.name} does not say where to download it", f"add download to it, or {files}"
    )


def _logs_in(to: Path, definition: DatasetDefinition) -> list[str]:
    """Return the names of the files that would be read as logs."""
    return [file.name for file in RawLocation(str(to)).matching(definition.logs.files)] if to.is_dir() else []


def _targets(definition: DatasetDefinition, source: Download, to: Path) -> list[Target]:
    targets = [Target(archive, to / ARCHIVES) for archive in source.archives]
    for target in targets:
        url = target.archive.url
        if (
            urllib.parse.urlsplit(url).scheme not in ("http", "https")
            or not re.fullmatch(r"[^/\\\x00]+", target.name)
            or target.name.startswith(".")
        ):
            raise StageError(
                f"the download of {definition.name} has the url {url!r}, which names no file",
                "give http(s)://host/path/name of a file",
            )
        if target.name.endswith(UNKNOWN_KINDS):
            raise StageError(
                f"{target.name} is of a kind that is not unpacked here",
                f"use one of {', '.join((*TARS, *ZIPS))}, or a plain file",
            )
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise StageError(
            f"two archives of {definition.name} have one file name: {', '.join(names)}",
            "give archives of different names",
        )
    return targets


def _check_folder(definition: DatasetDefinition, to: Path) -> None:
    """Raise a StageError where the files would mix with those of another data set."""
    if (to / SIMULATED_MARKER).exists():
        raise StageError(f"{to} holds simulated logs ({SIMULATED_MARKER})", "give another folder with --to")
    marker = _json(to / MARKER)
    if marker and marker.get("dataset") != definition.name and not _as_defined(definition, marker):
        raise StageError(
            f"{to} holds the data set {marker.get('dataset')} ({MARKER})",
            "give another folder with --to: two data sets in one would mix",
        )


def _as_defined(definition: DatasetDefinition, marker: dict[str, Any]) -> bool:
    """Whether a marker names the archives and members that the definition names."""
    wanted = definition.download.archives if definition.download else ()
    there = marker.get("archives") or []
    return len(there) == len(wanted) and all(
        old.get("url") == new.url
        and new.md5 in (None, old.get("md5"))
        and tuple(old.get("members") or ()) == new.members
        for old, new in zip(there, wanted, strict=True)
    )


def _finished(definition: DatasetDefinition, to: Path) -> bool:
    """Whether an earlier call left everything, and it is still there; logged either way."""
    marker = _json(to / MARKER)
    if not marker:
        return False
    if not _as_defined(definition, marker):
        log(f"the definition has changed since {marker.get('finished')}: downloading again")
        return False
    files = {name: size for archive in marker["archives"] for name, size in archive["files"].items()}
    for name, size in files.items():
        if not (to / name).is_file() or (to / name).stat().st_size != size:
            log(f"{name} is missing or has another size than {MARKER} says: downloading again")
            return False
    log(f"nothing to do: {len(files)} files ({_size(sum(files.values()))}) are there since {marker.get('finished')}")
    return True


@contextlib.contextmanager
def _locked(to: Path) -> Iterator[None]:
    """Keep a second download out of the folder; the system drops the lock with the process."""
    folder = os.open(to, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"another process is downloading into {to}", "wait for it, or end it") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(folder)


# Sizes and room


def _sizes(targets: list[Target], page: str) -> dict[Target, int | None]:
    """Return the size of each archive that must be downloaded: of the definition or as the server says."""
    sizes: dict[Target, int | None] = {}
    for target in targets:
        if target.here():
            log(f"{target.name}: there already ({_size(target.whole.stat().st_size)})")
            continue
        stated_bytes = _ask(target, page).size
        if stated_bytes is not None and target.archive.bytes not in (None, stated_bytes):
            raise StageError(
                f"{target.archive.url} has {stated_bytes:,} bytes, but the definition says {target.archive.bytes:,}",
                f"see {page}, then correct bytes (and md5) in the definition",
            )
        sizes[target] = size = target.archive.bytes if stated_bytes is None else stated_bytes
        at_hand = target.at_hand()
        log(
            f"{target.name}: {'size unknown' if size is None else _size(size)}"
            + (f", of which {_size(at_hand)} are there" if at_hand else "")
        )
    return sizes


def _ask(target: Target, page: str) -> Remote:
    """Return what the server says about a file without sending it."""
    for failures in range(1, FIRST_TRIES + 1):
        try:
            with _open(target.archive.url, "HEAD", {}) as response:
                return Remote.of(response)
        except _Refused as refused:
            if refused.code in HEAD_NOT_SERVED:
                return Remote()
            raise _refusal(target, page, refused) from None
        except _Lost as lost:
            if failures == FIRST_TRIES:
                raise _unreachable(target, lost) from None
            _wait(target, lost, failures)
    raise AssertionError("unreachable")


def _check_all_room(targets: list[Target], sizes: dict[Target, int | None], to: Path) -> None:
    archives = sum(max(size - target.at_hand(), 0) for target, size in sizes.items() if size is not None)
    unpacked = sum(UNPACKED_PER_BYTE * size for target, size in sizes.items() if size is not None and target.packed)
    _check_room(to, archives + unpacked, f"{_size(archives)} to download and about {_size(unpacked)} unpacked")


def _check_room(folder: Path, needed: int, what: str) -> None:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StageError(
            f"the disk of {folder} has {free:,} bytes free, but {needed:,} are needed ({what})",
            "free some, or give a folder on another disk with --to",
        )


# Download


def _fetch(target: Target, page: str) -> str:
    """Bring one archive to `target.whole`, checked; return its md5."""
    target.bad.unlink(missing_ok=True)
    if target.here():
        if known := target.noted().get("md5"):
            return str(known)
        log(f"{target.name} was put into {target.folder} by hand")
        return _checked(target, target.whole)
    _Transfer(target, page).run()
    md5 = _checked(target, target.part)
    _write_json(target.notes, {**target.noted(), "md5": md5})
    _sync(target.part)
    os.replace(target.part, target.whole)
    return md5


class _Transfer:
    """The download of one archive into its `.part` file, over as many connections as it takes."""

    def __init__(self, target: Target, page: str) -> None:
        self.target, self.page, self.restarts = target, page, 0

    def run(self) -> None:
        failures = 0
        while True:
            before = self.target.at_hand()
            try:
                return self._receive()
            except _Refused as refused:
                raise _refusal(self.target, self.page, refused) from None
            except _Lost as lost:
                failures = 1 if self.target.at_hand() > before else failures + 1
                if failures >= TRIES:
                    raise _unreachable(self.target, lost) from None
                _wait(self.target, lost, failures)

    def _receive(self) -> None:
        target, earlier, offset = self.target, self.target.earlier(), self.target.at_hand()
        if offset and offset == earlier.size:
            return  # whole; only the check was missing
        if offset > (earlier.size or offset):
            return self._start_anew("more bytes are there than the file has")
        headers = {}
        if offset and not (earlier.etag or earlier.last_modified or target.archive.md5):
            return self._start_anew("nothing would show whether the file is still the same")
        if offset:
            headers["Range"] = f"bytes={offset}-"
            if earlier.if_range:
                headers["If-Range"] = earlier.if_range
        try:
            response = _open(target.archive.url, "GET", headers)
        except _Refused as refused:
            if refused.code == 416 and offset:
                return self._start_anew("the server has no such bytes")
            raise
        with response:
            remote = Remote.of(response)
            if offset and response.status == 206:
                if remote.is_other_than(earlier) or _content_range(response)[0] != offset:
                    return self._start_anew("the file has changed on the server")
                log(f"{target.name}: going on after {_size(offset)}")
            elif offset:
                self._count_restart(
                    "the file has changed on the server"
                    if remote.is_other_than(earlier)
                    else "the server cannot resume"
                )
                offset = 0
            self._store(response, remote, offset)

    def _store(self, response: http.client.HTTPResponse, remote: Remote, offset: int) -> None:
        target, began = self.target, time.monotonic()
        position = offset
        with target.part.open("ab" if offset else "wb") as file, Progress(target.name, remote.size, offset) as progress:
            expected = remote.size if remote.size is not None else target.archive.bytes
            # Only now, with the old bytes gone, the new notes: what is in the file is always of the version they name.
            _write_json(
                target.notes,
                {
                    "url": target.archive.url,
                    "size": remote.size,
                    "etag": remote.etag,
                    "last_modified": remote.last_modified,
                },
            )
            while expected is None or position < expected:
                try:
                    chunk = response.read1(CHUNK)
                except (OSError, http.client.HTTPException) as error:
                    raise _Lost(f"the connection broke after {position:,} bytes ({_reason(error)})") from None
                if not chunk:
                    break
                file.write(chunk)
                file.flush()  # a killed process loses nothing that had come
                position += len(chunk)
                progress.add(len(chunk))
        if expected is not None and position < expected:
            raise _Lost(f"the connection ended after {position:,} of {expected:,} bytes")
        log(f"{target.name}: {_size(position - offset)} in {_duration(time.monotonic() - began)}")

    def _start_anew(self, why: str) -> None:
        self._count_restart(why)
        self.target.part.unlink(missing_ok=True)
        self.target.notes.unlink(missing_ok=True)
        self._receive()

    def _count_restart(self, why: str) -> None:
        self.restarts += 1
        if self.restarts > RESTARTS:
            raise StageError(
                f"{self.target.name} began {RESTARTS} times anew: {why}",
                f"try later, or download {self.target.archive.url} in a browser and put it into {self.target.folder}",
            )
        log(f"{self.target.name}: from its beginning, because {why}")


class _SameMethod(urllib.request.HTTPRedirectHandler):
    """Asks the same thing of the address that a server sends us to.

    Python 3.11 turns a redirected HEAD into a GET, so that the server begins to send the whole archive for its size.
    """

    def redirect_request(self, req: urllib.request.Request, *answer: Any) -> urllib.request.Request | None:
        moved = super().redirect_request(req, *answer)
        if moved is not None:
            moved.method = req.get_method()
        return moved


def _open(url: str, method: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    request = urllib.request.Request(
        url, method=method, headers={"User-Agent": "longview", "Accept-Encoding": "identity", **headers}
    )
    try:
        opener = urllib.request.build_opener(_SameMethod)
        response: http.client.HTTPResponse = opener.open(request, timeout=TIMEOUT_SECONDS)
        return response
    except urllib.error.HTTPError as error:
        with error:
            if error.code in PASSING:
                wait = error.headers.get("Retry-After", "")
                raise _Lost(
                    f"the server answers {error.code} {error.reason}", float(wait) if wait.isdigit() else 0.0
                ) from None
            raise _Refused(error.code, str(error.reason)) from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise StageError(
                f"the certificate of {urllib.parse.urlsplit(url).netloc} is not trusted: {reason.verify_message}",
                "name your network's certificates in SSL_CERT_FILE",
            ) from None
        raise _Lost(_reason(reason)) from None


def _refusal(target: Target, page: str, refused: _Refused) -> StageError:
    return StageError(
        f"the server refuses {target.archive.url}: {refused}",
        f"see {page}; a file that you download there goes into {target.folder}, then repeat",
    )


def _unreachable(target: Target, lost: _Lost) -> StageError:
    host = urllib.parse.urlsplit(target.archive.url).netloc
    return StageError(
        f"{target.name} cannot be had from {host}: {lost}",
        "check the network (HTTPS_PROXY for a proxy) and repeat, what has come is kept; or download"
        f" {target.archive.url} in a browser, put it into {target.folder} and repeat",
    )


def _wait(target: Target, lost: _Lost, failures: int) -> None:
    seconds = min(max(BACKOFF_SECONDS * 2 ** (failures - 1), lost.wait_seconds), LONGEST_WAIT_SECONDS)
    log(f"{target.name}: {lost}; trying again in {seconds:.0f} s")
    time.sleep(seconds)


def _content_range(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """Return (first byte, size of the whole file) of a partial answer."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2]) if match[2] != "*" else None) if match else (None, None)


def _checked(target: Target, path: Path) -> str:
    """Return the md5 of a file that has come.

    Raises:
        StageError: it is not what the definition says; the file is moved aside.
    """
    size = path.stat().st_size
    if target.archive.bytes not in (None, size):
        _set_aside(target, path)
        raise StageError(
            f"{target.name} has {size:,} bytes, but the definition says {target.archive.bytes:,}",
            f"repeat to download it anew (this one is {target.bad})",
        )
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file, Progress(f"checking {target.name}", size) as progress:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.add(len(chunk))
    md5 = digest.hexdigest()
    if target.archive.md5 not in (None, md5):
        _set_aside(target, path)
        raise StageError(
            f"{target.name} has the md5 {md5}, but the definition says {target.archive.md5}",
            f"repeat to download it anew (this one is {target.bad}); if that does not help, the published file has"
            " changed",
        )
    return md5


def _set_aside(target: Target, path: Path) -> None:
    os.replace(path, target.bad)
    target.notes.unlink(missing_ok=True)


# Unpacking


@dataclass(frozen=True)
class _Member:
    """One entry of an archive; `open` is None for what is not a file: folders, links, devices."""

    path: str
    size: int
    folder: bool
    open: Callable[[], IO[bytes]] | None


def _unpack(target: Target, work: Path, taken: set[str]) -> dict[str, Path]:
    """Unpack the members that are raw files; return where each waits under its final name."""
    globs = target.archive.members
    if not target.packed:
        if not _matching(target.name, globs):
            raise StageError(f"{target.name} does not match {', '.join(globs)}", "correct members in the definition")
        return {_free_name(target, target.name, taken): target.whole}
    files: dict[str, Path] = {}
    matched: set[str] = set()
    seen: list[str] = []
    try:
        with Progress(f"unpacking {target.name}", None) as progress:
            for member in _members(target):
                if member.folder:
                    continue
                seen.append(member.path)
                hits = _matching(member.path, globs)
                if not hits:
                    continue
                matched |= hits
                if member.open is None:
                    raise StageError(
                        f"{target.name} holds {member.path!r}, which is a link or a device, not a file",
                        "do not use this archive, or name only its files in the definition",
                    )
                name = _free_name(target, _safe_name(target, member), taken | set(files))
                _check_room(work, member.size, f"{name} of {target.name}")
                files[name] = work / name
                with member.open() as source, files[name].open("wb") as file:
                    while chunk := source.read(CHUNK):
                        file.write(chunk)
                        progress.add(len(chunk))
    except DAMAGED as error:
        as_published = target.archive.md5 is not None
        if not as_published:
            _set_aside(target, target.whole)
        raise StageError(
            f"{target.name} cannot be unpacked: {_reason(error)}",
            (
                f"see whether {target.archive.url} is that file"
                if as_published
                else f"repeat to download it anew (this one is {target.bad})"
            ),
        ) from None
    if missing := [glob for glob in globs if glob not in matched]:
        raise StageError(
            f"no file in {target.name} matches {', '.join(missing)}; it holds"
            f" {', '.join(seen[:10])}{', ...' if len(seen) > 10 else ''}",
            f"correct members in the definition; the archive stays in {target.folder}",
        )
    for path in files.values():
        _sync(path)
        log(f"unpacked {path.name} ({_size(path.stat().st_size)})")
    return files


def _members(target: Target) -> Iterator[_Member]:
    """Yield the entries of an archive; each must be read before the next is asked for."""
    if target.name.endswith(ZIPS):
        with zipfile.ZipFile(target.whole) as archive:
            for info in archive.infolist():
                regular = stat.S_IFMT(info.external_attr >> 16) in (
                    0,
                    stat.S_IFREG,
                )  # 0: written where there are no modes
                yield _Member(
                    info.filename.replace("\\", "/"),
                    info.file_size,
                    info.is_dir(),
                    functools.partial(archive.open, info) if regular and not info.is_dir() else None,
                )
        return
    with contextlib.ExitStack() as stack:
        plain = target.name.endswith(".tar")
        opened = cast(IO[bytes], target.whole.open("rb") if plain else gzip.open(target.whole, "rb"))
        stream = stack.enter_context(opened)
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for entry in tar:
                yield _Member(
                    entry.name,
                    entry.size,
                    entry.isdir(),
                    functools.partial(_content, tar, entry) if entry.isreg() else None,
                )
        while stream.read(CHUNK):  # tarfile ends quietly where blocks are damaged; the checksum of gzip comes last
            pass


def _content(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(entry)
    assert stream is not None  # it is for what is not a file
    return stream


def _matching(path: str, globs: tuple[str, ...]) -> set[str]:
    """Return the globs that match a path; hidden files (as macOS adds them, ._name) are never raw files."""
    return (
        set()
        if posixpath.basename(path).startswith("._")
        else {glob for glob in globs if fnmatch.fnmatchcase(path, glob)}
    )


def _safe_name(target: Target, member: _Member) -> str:
    """Return the file name of a member.

    Raises:
        StageError: its path leads out of the archive.
    """
    parts = member.path.split("/")
    if member.path.startswith("/") or ".." in parts or re.match("[A-Za-z]:", member.path) or "\x00" in member.path:
        raise StageError(
            f"{target.name} holds {member.path!r}, a path that leads out of the archive",
            "do not use this archive, or name only its good members in the definition",
        )
    return parts[-1]


def _free_name(target: Target, name: str, taken: set[str]) -> str:
    if name in taken:
        raise StageError(
            f"two files of the archives are named {name}, the second in {target.name}",
            "name only one of them by members in the definition",
        )
    if name in (MARKER, SIMULATED_MARKER, ARCHIVES):
        raise StageError(
            f"{target.name} holds a file named {name}, a name that is used here otherwise",
            "leave it out by members in the definition",
        )
    return name


# The end


def _publish(
    definition: DatasetDefinition, source: Download, to: Path, staged: dict[str, Path], found: list[dict[str, Any]]
) -> None:
    """Rename the files into the raw folder and write the marker; files that an earlier definition brought go."""
    before = {name for archive in _json(to / MARKER).get("archives") or [] for name in archive.get("files") or {}}
    (to / MARKER).unlink(missing_ok=True)
    for name, path in staged.items():
        os.replace(path, to / name)
    for name in sorted(before - set(staged)):
        log(f"removing {name}, which an earlier download brought")
        (to / name).unlink(missing_ok=True)
    for name in [name for name in _logs_in(to, definition) if name not in staged]:
        log(f"warning: {name} is in {to} too and will be read as a log; this download did not bring it")
    _write_json(
        to / MARKER,
        {
            "dataset": definition.name,
            "title": definition.title,
            "licence": source.licence,
            "page": source.page,
            "finished": dtm.datetime.now(dtm.UTC).isoformat(timespec="seconds"),
            "archives": found,
        },
    )


def _remove_archives(targets: list[Target], to: Path) -> None:
    """Remove what was downloaded; archives that were put there by hand have no notes, and stay."""
    for target in targets:
        if target.notes.exists():
            target.whole.unlink(missing_ok=True)
            target.notes.unlink()
    with contextlib.suppress(OSError):
        (to / ARCHIVES).rmdir()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    new = path.with_name(f"{path.name}.new")
    new.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _sync(new)
    os.replace(new, path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _reason(error: object) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text or type(error).__name__


def _size(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return (
        f"{whole} s"
        if whole < 60
        else f"{whole // 60} min {whole % 60} s"
        if whole < 3_600
        else f"{whole // 3_600} h {whole % 3_600 // 60} min"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help=f"{', '.join(built_in_names())}, or the path of a definition")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="the raw folder; made where it is missing")
    parser.add_argument(
        "--dry-run", action="store_true", help="ask the servers for sizes and say what would be done; write nothing"
    )
    parser.add_argument("--keep-archives", action="store_true", help=f"leave the archives in FOLDER/{ARCHIVES}")
    args = parser.parse_args(arguments)
    given = args.dataset
    if not given:
        with_archives = [name for name in built_in_names() if (source := dataset(name).download) and source.archives]
        raise StageError(
            "no data set is named",
            f"give one of {', '.join(with_archives)} (DATASET= for make data), or the path of a definition",
        )
    if definition_name(given) == given:
        given = given.lower().replace("-", "_")  # as its makers write it: KuaiRand-1K
    if "://" in args.to:
        raise StageError(f"{args.to} is not a folder of this machine", "download to one, then copy its files")
    to = Path(args.to).expanduser().absolute()
    try:
        download(dataset(given), to, dry_run=args.dry_run, keep_archives=args.keep_archives)
    except OSError as error:
        raise StageError(
            f"{error.filename or to} cannot be written: {_reason(error)}",
            "correct that and repeat; what has come stays",
        ) from None
    except KeyboardInterrupt:
        log("interrupted; the same command goes on from here")
        sys.exit(130)


if __name__ == "__main__":
    run_stage(main)
