"""A folder of files is the same to its readers on a disk and in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from etl.stage.errors import StageError
from etl.stage.folder import Folder
from tests.s3 import BUCKET, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as query:
        yield query


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path) -> Folder:
    if request.param == "disk":
        return Folder(str(tmp_path / "runs"), "--runs").below("a")
    return Folder(f"s3://{BUCKET}/{tmp_path.name}{request.getfixturevalue('s3')}", "--runs").below("a")


def test_small_files_are_written_read_added_to_and_dropped(folder):
    assert not folder.exists() and folder.names() == [] and folder.files() == []
    assert folder.read_text("x.json") is None and folder.bytes_of("x.json") == 0
    folder.forget("x.json")
    folder.write_text("x.json", "{}")
    folder.append_text("log/lines", "é\n")
    folder.append_text("log/lines", "b\n")
    assert folder.exists() and folder.exists("log")
    assert (folder.read_text("x.json"), folder.read_text("log/lines")) == ("{}", "é\nb\n")
    assert folder.bytes_of("log/lines") == 5 and folder.below("log").read_text("lines") == "é\nb\n"
    assert folder.names() == ["log", "x.json"] and folder.names("log") == ["lines"]
    assert sorted(info.base_name for info in folder.files()) == ["lines", "x.json"]
    folder.forget("x.json")
    assert folder.names() == ["log"]
    assert Folder(folder.address, "--runs").read_text("log/lines") == "é\nb\n"


def test_what_a_library_writes_appears_whole_and_is_read_by_path(folder):
    with folder.written("plot.png") as path:
        assert path.suffix == ".png"
        path.write_bytes(b"png")
        assert "plot.png" not in folder.names()
    with folder.written(lambda path: f"1-{len(path.read_bytes())}.pt") as path:
        path.write_bytes(b"12345")
    assert folder.names() == ["1-5.pt", "plot.png"]
    with pytest.raises(ValueError, match="full"), folder.written("half") as path:
        path.write_bytes(b"1")
        raise ValueError("full")
    assert folder.names() == ["1-5.pt", "plot.png"]
    for text in ("old", "new"):
        with folder.written_folder("models/vql") as package:
            package.mkdir(parents=True, exist_ok=True)
            (package / "config.json").write_text(text)
    with folder.read_locally("models/vql") as package, folder.read_locally("plot.png") as plot:
        assert (package / "config.json").read_text() == "new"
        assert plot.name == "plot.png" and plot.read_bytes() == b"png"
    assert Path(package).exists() is folder.is_local  # a copy goes with its reader


def test_a_file_that_is_not_there_and_an_address_with_a_key_are_said(folder):
    if not folder.is_local:
        with (
            pytest.raises(StageError, match=r"s3://lake/.*/a/models/vql\?.* is missing"),
            folder.read_locally("models/vql"),
        ):
            pass
    with pytest.raises(StageError, match=r"--runs gives .* holds a user, a password or a key") as refused:
        Folder("s3://key:s3cret@bucket/runs", "--runs")
    assert "s3cret" not in str(refused.value)
    with pytest.raises(StageError, match=r"nowhere://x, which --runs gives, cannot be opened"):
        Folder("nowhere://x", "--runs")
