"""Downloads against a real server on the loopback: whole, cut off, changed, damaged, hostile, and without room."""

from __future__ import annotations

import collections
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
import yaml

from etl.ingest import download
from etl.ingest.download import MARKER, main
from etl.stage.errors import StageError
from tests.waiting import wait_for

LOG = "log_standard_4_08_to_4_21_x.csv"
USERS = "user_features_x.csv"
MEMBERS = ["*/data/log_*.csv", "*/data/*user_features_*.csv"]
NOISE = random.Random(1).randbytes(300_000)  # does not compress, so that archives are long enough to be cut
CONTENTS = {LOG: b"user_id,video_id\n" + NOISE, USERS: b"user_id\n1\n"}
Archive = dict[str, object]


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; the other fields make it misbehave."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.etag: str | None = '"one"'
        self.cuts: list[int] = []  # bytes after which the next connections are dropped
        self.ranges, self.head, self.sized = True, True, True
        self.status: list[int] = []  # of the next answers
        self.pause = 0.0
        self.moved = False  # `files` have gone to another address, to which the old one leads
        self.requests: list[tuple[str, str | None]] = []  # method, Range
        self.served = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/files/{name}?download=1"

    def gets(self) -> list[str | None]:
        return [asked for method, asked in self.requests if method == "GET"]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def do_GET(self) -> None:
        self.answer(send=True)

    def answer(self, send: bool) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.command, asked))
        if server.moved and self.path.startswith("/files/"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/files/", "/moved/"))
            self.end_headers()
            return
        body = server.files.get(self.path.split("?")[0].rsplit("/", 1)[1])
        status = (
            server.status.pop(0)
            if server.status
            else 404
            if body is None
            else 405
            if not (send or server.head)
            else 200
        )
        if status != 200 or body is None:
            self.send_response(status)
            self.end_headers()
            return
        start, total = 0, len(body)
        if asked and server.ranges and self.headers.get("If-Range") in (None, server.etag):
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.sized:
            self.send_header("Content-Length", str(total - start))
        self.end_headers()
        if not send:
            return
        cut = server.cuts.pop(0) if server.cuts else total
        for at in range(start, min(start + cut, total), 8_192):
            piece = body[at : min(at + 8_192, start + cut)]
            try:
                self.wfile.write(piece)
            except OSError:
                return
            server.served += len(piece)
            time.sleep(server.pause)
        if cut < total - start:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF_SECONDS", 0.01)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def tar_gz(contents: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:gz") as archive:
        folder = tarfile.TarInfo("KuaiRand-X/data")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info)
    return body.getvalue()


def zipped(contents: dict[str, bytes]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("KuaiRand-X/data")
        for name, content in contents.items():
            archive.writestr(name, content)
    return body.getvalue()


PUBLISHED = {f"KuaiRand-X/data/{name}": content for name, content in CONTENTS.items()}
OTHERS = {
    "KuaiRand-X/LICENSE": b"CC",
    "KuaiRand-X/data/video_features_statistic_x.csv": b"large",
    f"KuaiRand-X/data/._{USERS}": b"of macOS",
}
TAR = tar_gz(PUBLISHED | OTHERS)


def md5(body: bytes) -> str:
    return hashlib.md5(body).hexdigest()


def definition(folder: Path, *archives: Archive, name: str = "my_rand") -> str:
    path = folder / f"{name}.yaml"
    source = {"licence": "CC BY-SA 4.0", "page": "https://example.org/x", "archives": list(archives)}
    path.write_text(yaml.safe_dump({"extends": "kuairand", "name": name, "title": "My Rand", "download": source}))
    return str(path)


def call(path: str, to: Path, *options: str) -> None:
    main(["--dataset", path, "--to", str(to), *options])


def fails(path: str, to: Path, *options: str) -> str:
    with pytest.raises(StageError) as caught:
        call(path, to, *options)
    return str(caught.value)


def files(to: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(to)): path.read_bytes()
        for path in sorted(to.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


@pytest.fixture
def one(server, tmp_path) -> tuple[str, Path]:
    """One tar.gz with its md5: (definition, raw folder)."""
    server.files["X.tar.gz"] = TAR
    return definition(tmp_path, {"url": server.url("X.tar.gz"), "md5": md5(TAR), "members": MEMBERS}), tmp_path / "raw"


@pytest.mark.parametrize(
    ("name", "body"), [("X.tar.gz", TAR), ("X.zip", zipped(PUBLISHED | OTHERS)), ("X.tar", gzip.decompress(TAR))]
)
def test_the_raw_files_of_an_archive_are_unpacked_flat_and_a_second_call_asks_nothing(
    server, tmp_path, capsys, name, body
):
    server.files[name] = body
    path = definition(tmp_path, {"url": server.url(name), "md5": md5(body), "bytes": len(body), "members": MEMBERS})
    call(path, tmp_path / "raw")
    shown = capsys.readouterr().out
    assert shown.startswith("My Rand\n  licence  CC BY-SA 4.0\n  page     https://example.org/x\n")
    assert files(tmp_path / "raw") == CONTENTS
    marker = json.loads((tmp_path / "raw" / MARKER).read_text())
    assert marker["archives"][0]["md5"] == md5(body)
    assert marker["archives"][0]["files"] == {name: len(content) for name, content in CONTENTS.items()}
    asked = len(server.requests)
    call(path, tmp_path / "raw")
    assert "nothing to do: 2 files" in capsys.readouterr().out
    assert len(server.requests) == asked == 2


def test_plain_files_are_taken_as_they_are(server, tmp_path):
    packed = gzip.compress(b"user_id\n")
    server.files = {LOG: CONTENTS[LOG], f"{USERS}.gz": packed}
    path = definition(tmp_path, {"url": server.url(LOG)}, {"url": server.url(f"{USERS}.gz"), "members": ["user_*"]})
    call(path, tmp_path / "raw", "--keep-archives")
    assert files(tmp_path / "raw") == {LOG: CONTENTS[LOG], f"{USERS}.gz": packed}


def test_kept_archives_need_no_second_download(server, one, capsys):
    path, raw = one
    call(path, raw, "--keep-archives")
    assert files(raw)["archives/X.tar.gz"] == TAR
    (raw / LOG).write_bytes(b"shortened")
    call(path, raw)
    assert "another size" in capsys.readouterr().out
    assert files(raw) == CONTENTS
    assert len(server.gets()) == 1


def test_dropped_connections_are_taken_up_where_they_broke(server, one):
    path, raw = one
    server.cuts = [100_000, 50_000]
    call(path, raw)
    assert files(raw) == CONTENTS
    assert server.gets() == [None, "bytes=100000-", "bytes=150000-"]
    assert server.served == len(TAR)


def test_a_killed_download_goes_on_and_gives_equal_bytes(server, one):
    path, raw = one
    server.pause = 0.02
    process = subprocess.Popen(
        [sys.executable, "-m", "etl.ingest.download", "--dataset", path, "--to", str(raw)], stdout=subprocess.DEVNULL
    )
    part = raw / "archives" / "X.tar.gz.part"
    wait_for("half a file", lambda: part.exists() and part.stat().st_size > 60_000, every=0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = part.stat().st_size
    assert 60_000 < there < len(TAR)
    assert set(files(raw)) == {"archives/X.tar.gz.part", "archives/X.tar.gz.json"}
    server.pause = 0.0
    call(path, raw)
    assert server.gets() == [None, f"bytes={there}-"]
    assert files(raw) == CONTENTS
    assert json.loads((raw / MARKER).read_text())["archives"][0]["md5"] == md5(TAR)


def interrupted(server, path: str, raw: Path, monkeypatch, after: int = 100_000) -> None:
    """Leave `after` bytes in the .part file, as a call does that finds no server any more."""
    server.cuts = [after]
    with monkeypatch.context() as patch:
        patch.setattr(download, "_wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit) as ended:
            call(path, raw)
    assert ended.value.code == 130
    assert (raw / "archives" / "X.tar.gz.part").stat().st_size == after
    server.requests.clear()


def test_a_server_that_leads_elsewhere_is_followed_and_sends_the_file_once(server, one):
    path, raw = one
    server.moved, server.cuts = True, [100_000]
    call(path, raw)
    assert files(raw) == CONTENTS
    size, first, rest = ("HEAD", None), ("GET", None), ("GET", "bytes=100000-")
    assert server.requests == [size, size, first, first, rest, rest]


def test_a_server_that_ignores_ranges_sends_the_file_from_its_beginning(server, one, monkeypatch, capsys):
    path, raw = one
    interrupted(server, path, raw, monkeypatch)
    server.ranges = False
    call(path, raw)
    assert server.gets() == ["bytes=100000-"]
    assert "from its beginning, because the server cannot resume" in capsys.readouterr().out
    assert files(raw) == CONTENTS


@pytest.mark.parametrize("with_md5", [True, False])
def test_a_changed_file_is_downloaded_from_its_beginning(server, tmp_path, monkeypatch, capsys, with_md5):
    server.files["X.tar.gz"] = TAR
    path, raw = definition(tmp_path, {"url": server.url("X.tar.gz"), "members": MEMBERS}), tmp_path / "raw"
    interrupted(server, path, raw, monkeypatch)
    newer = {name: content[::-1] for name, content in PUBLISHED.items()}
    server.files["X.tar.gz"], server.etag = tar_gz(newer), '"two"'
    if with_md5:
        path = definition(
            tmp_path, {"url": server.url("X.tar.gz"), "members": MEMBERS, "md5": md5(server.files["X.tar.gz"])}
        )
    call(path, raw)
    assert server.gets() == ["bytes=100000-"]
    assert "the file has changed on the server" in capsys.readouterr().out
    assert files(raw) == {Path(name).name: content for name, content in newer.items()}


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_a_changed_file_is_noticed_too(server, tmp_path, monkeypatch, etag):
    server.files["X.tar.gz"], server.etag = TAR, etag
    path, raw = definition(tmp_path, {"url": server.url("X.tar.gz"), "members": MEMBERS}), tmp_path / "raw"
    interrupted(server, path, raw, monkeypatch)
    server.files["X.tar.gz"] = tar_gz(PUBLISHED | {"KuaiRand-X/README": b"new"})
    server.etag = etag and 'W/"newer"'
    call(path, raw)
    assert server.gets()[-1] is None
    assert files(raw) == CONTENTS


def test_a_file_that_never_stays_the_same_is_given_up(server, one):
    path, raw = one
    server.ranges, server.cuts = False, [50_000] * 9
    assert "began 3 times anew" in fails(path, raw)


def test_another_md5_is_an_error_and_the_next_call_starts_anew(server, one):
    path, raw = one
    server.files["X.tar.gz"] = TAR[:-1] + b"?"
    message = fails(path, raw)
    assert md5(TAR) in message
    assert md5(TAR[:-1] + b"?") in message
    assert set(files(raw)) == {"archives/X.tar.gz.bad"}
    server.files["X.tar.gz"] = TAR
    call(path, raw)
    assert server.gets() == [None, None]
    assert files(raw) == CONTENTS


@pytest.mark.parametrize(
    "body", [TAR[:200_000], b"<html>Please log in</html>", TAR[:150_000] + b"\0" * 64 + TAR[150_064:]]
)
def test_a_damaged_archive_leaves_no_file_and_the_next_call_starts_anew(server, tmp_path, body):
    server.files["X.tar.gz"] = body
    path, raw = definition(tmp_path, {"url": server.url("X.tar.gz"), "members": MEMBERS}), tmp_path / "raw"
    assert "X.tar.gz cannot be unpacked" in fails(path, raw)
    assert set(files(raw)) == {"archives/X.tar.gz.bad"}
    server.files["X.tar.gz"] = TAR
    call(path, raw)
    assert files(raw) == CONTENTS


def test_unpacking_that_is_cut_off_leaves_no_half_file_and_needs_no_new_download(server, one, monkeypatch):
    path, raw = one
    with monkeypatch.context() as patch:
        patch.setattr(download, "_publish", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert "No space left on device" in fails(path, raw)
    assert set(files(raw)) == {"archives/X.tar.gz", "archives/X.tar.gz.json"}
    call(path, raw)
    assert files(raw) == CONTENTS
    assert len(server.gets()) == 1


def test_a_process_killed_while_it_unpacks_leaves_no_half_file(server, one):
    path, raw = one
    code = """if True:
        import os, signal
        from etl.ingest import download
        def add(progress, count):
            progress.position += count
            if progress.label.startswith("unpacking"):
                os.kill(os.getpid(), signal.SIGKILL)
        download.CHUNK, download.Progress.add = 50_000, add
        download.main()"""
    done = subprocess.run([sys.executable, "-c", code, "--dataset", path, "--to", str(raw)], stdout=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    assert [name for name in files(raw) if "/" not in name] == []
    assert files(raw)[f"archives/.unpacked/{LOG}"] < CONTENTS[LOG]
    call(path, raw)
    assert files(raw) == CONTENTS
    assert len(server.gets()) == 1


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("X.tar.gz", tar_gz({"../../data/log_evil.csv": b"x"}), "leads out of the archive"),
        ("X.tar.gz", tar_gz({"/tmp/data/log_evil.csv": b"x"}), "leads out of the archive"),
        ("X.zip", zipped({"a/../../data/log_evil.csv": b"x"}), "leads out of the archive"),
        ("X.zip", zipped({"a\\..\\data\\log_evil.csv": b"x"}), "leads out of the archive"),
        ("X.tar.gz", tar_gz({}, link("a/data/log_evil.csv", tarfile.SYMTYPE)), "a link or a device"),
        ("X.tar.gz", tar_gz({}, link("a/data/log_evil.csv", tarfile.LNKTYPE)), "a link or a device"),
        (
            "X.tar.gz",
            tar_gz({"a/data/log_x.csv": b"1", "b/data/log_x.csv": b"2"}),
            "two files of the archives are named log_x.csv",
        ),
        (
            "X.tar.gz",
            tar_gz({"a/log_x.csv": b"1"}),
            "no file in X.tar.gz matches */data/log_*.csv; it holds a/log_x.csv",
        ),
    ],
)
def test_archives_that_are_not_what_they_should_be_are_refused(server, tmp_path, name, body, says):
    server.files[name] = body
    raw = tmp_path / "raw"
    assert says in fails(definition(tmp_path, {"url": server.url(name), "members": ["*/data/log_*.csv"]}), raw)
    assert set(files(tmp_path)) == {"my_rand.yaml", f"raw/archives/{name}", f"raw/archives/{name}.json"}
    assert not (raw / MARKER).exists()


def test_a_link_in_a_zip_is_refused(server, tmp_path):
    info = zipfile.ZipInfo("a/data/log_evil.csv")
    info.external_attr = 0o120777 << 16
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    server.files["X.zip"] = body.getvalue()
    assert "a link or a device" in fails(definition(tmp_path, {"url": server.url("X.zip")}), tmp_path / "raw")


def test_two_archives_may_not_bring_one_file(server, tmp_path):
    server.files = {"a.tar.gz": TAR, "b.zip": zipped(PUBLISHED)}
    path = definition(tmp_path, *({"url": server.url(name), "members": MEMBERS} for name in server.files))
    assert f"two files of the archives are named {LOG}, the second in b.zip" in fails(path, tmp_path / "raw")
    assert LOG not in files(tmp_path / "raw")


def test_a_disk_without_room_is_told_before_anything_comes(server, one, monkeypatch):
    path, raw = one
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, len(TAR) * 4 - 1))
    message = fails(path, raw)
    assert f"has {len(TAR) * 4 - 1:,} bytes free, but {len(TAR) * 4:,} are needed" in message
    assert server.gets() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 0, len(TAR) * 4))
    call(path, raw)


def test_a_dry_run_writes_nothing(server, one, capsys):
    path, raw = one
    call(path, raw, "--dry-run")
    assert f"X.tar.gz: {download._size(len(TAR))}" in capsys.readouterr().out
    assert not raw.exists()
    assert server.requests == [("HEAD", None)]


def test_sizes_that_differ_from_the_definition_stop_it_at_once(server, tmp_path):
    server.files["X.tar.gz"] = TAR
    path = definition(tmp_path, {"url": server.url("X.tar.gz"), "bytes": 5, "members": MEMBERS})
    assert "but the definition says 5" in fails(path, tmp_path / "raw")
    server.sized = False
    assert "but the definition says 5" in fails(path, tmp_path / "raw")


def test_a_server_without_head_sizes_and_etags_will_do(server, one):
    path, raw = one
    server.head, server.sized, server.etag = False, False, None
    call(path, raw)
    assert files(raw) == CONTENTS


def test_passing_refusals_are_tried_again_and_others_are_not(server, one):
    path, raw = one
    server.status = [503, 200, 429, 500, 200]
    call(path, raw)
    assert files(raw) == CONTENTS
    shutil.rmtree(raw)
    server.status = [404]
    message = fails(path, raw)
    assert "404" in message
    assert "https://example.org/x" in message
    assert server.requests[-1] == ("HEAD", None)


def test_an_archive_that_was_fetched_by_hand_is_used_and_stays(server, one):
    path, raw = one
    (raw / "archives").mkdir(parents=True)
    (raw / "archives" / "X.tar.gz").write_bytes(TAR)
    call(path, raw)
    assert files(raw) == {**CONTENTS, "archives/X.tar.gz": TAR}
    assert server.requests == []


def test_an_unreachable_host_is_one_message_and_exit_code_2(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        path = definition(tmp_path, {"url": f"http://127.0.0.1:{unused.getsockname()[1]}/X.tar.gz"})
        code = "import etl.ingest.download as d; d.BACKOFF_SECONDS = 0; d.run_stage(d.main)"
        done = subprocess.run(
            [sys.executable, "-c", code, "--dataset", path, "--to", str(tmp_path / "raw")],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: X.tar.gz cannot be had from 127.0.0.1:")
    assert "Connection refused" in done.stderr
    assert "remedy: check the network" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("tmall", ["https://tianchi.aliyun.com/dataset/42", "user_log_format1.csv"]),
        ("kuairand", ["kuairand_1k", "https://zenodo.org/records/10439422", "log_standard_*.csv"]),
        ("kuairand_simulated", ["etl.datasets.simulate"]),
        ("", ["kuairand_1k"]),
    ],
)
def test_what_no_program_may_fetch_says_what_to_do(tmp_path, name, says):
    message = fails(name, tmp_path / "raw")
    assert all(part in message for part in says)
    assert name == "" or str(tmp_path / "raw") in message
    assert not (tmp_path / "raw").exists()


def test_files_that_were_put_there_by_hand_are_enough(tmp_path, capsys):
    (tmp_path / "user_log_format1.csv").write_bytes(b"x")
    call("tmall", tmp_path)
    assert "nothing to do: user_log_format1.csv is there" in capsys.readouterr().out


def test_names_may_be_written_as_their_makers_do(tmp_path, monkeypatch):
    named = []
    monkeypatch.setattr(download, "download", lambda definition, *_, **__: named.append(definition.name))
    for name in ("kuairand-1k", "KuaiRand-1K", "kuairand_1k"):
        call(name, tmp_path)
    assert named == ["kuairand_1k"] * 3


def test_data_sets_do_not_mix_in_one_folder(server, one, tmp_path):
    path, raw = one
    call(path, raw)
    server.files["Y.tar.gz"] = tar_gz({"Y/data/log_random_y.csv": b"y", f"Y/data/{USERS}": b"y"})
    other = {"url": server.url("Y.tar.gz"), "members": MEMBERS}
    assert "holds the data set my_rand" in fails(definition(tmp_path, other, name="other_rand"), raw)
    same = definition(tmp_path, {"url": server.url("X.tar.gz"), "md5": md5(TAR), "members": MEMBERS}, name="same_rand")
    call(same, raw)  # another definition of the same files
    call(definition(tmp_path, other), raw)  # a new version of the same data set: the old files go
    assert set(files(raw)) == {"log_random_y.csv", USERS}
    (raw / "SIMULATED.json").write_text("{}")
    assert "simulated" in fails(path, raw)


def test_a_second_process_is_kept_out(one):
    path, raw = one
    raw.mkdir()
    with download._locked(raw):
        assert "another process" in fails(path, raw)


def test_progress_is_lines_of_percent_where_there_is_no_terminal(server, one, monkeypatch, capsys):
    path, raw = one
    monkeypatch.setattr(download, "LOG_EVERY_SECONDS", 0.0)
    call(path, raw)
    shown = capsys.readouterr()
    assert f"X.tar.gz  100 %  {download._size(len(TAR))} of" in shown.out
    assert shown.err == ""


def test_progress_is_a_bar_on_a_terminal(server, one, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    path, raw = one
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    call(path, raw)
    assert "checking X.tar.gz" in capsys.readouterr().err
