"""A run's folder in an object store: what is written step by step is as on a disk."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator

import pytest
import torch

import training.ray_workers
from etl.stage.folder import Folder
from tests.s3 import BUCKET, s3_server
from tests.waiting import wait_for
from training import progress
from training.loop import TrainingState
from training.progress import PROGRESS_FILE, Progress
from training.resume import Checkpoint, Checkpoints
from training.run_folder import within_reach
from training.tracking import METRICS_FILE, MetricsBuffer


@pytest.fixture(scope="module")
def query() -> Iterator[str]:
    with s3_server() as found:
        yield found


@pytest.fixture
def folder(query, tmp_path) -> Folder:
    return Folder(f"s3://{BUCKET}/{tmp_path.name}/t{query}", "--runs")


def test_a_damaged_newest_checkpoint_gives_way_and_a_store_that_is_away_does_not(folder, monkeypatch):
    said: list[str] = []
    saved = Checkpoints(folder, {"seed": "7"}, 1, 1e9, said.append)
    assert saved.newest() == Checkpoint()
    for step in range(1, 5):
        state = TrainingState(step, 1, 2, torch.zeros(2), {"w": torch.full((100,), float(step))}, {}, [], None, 0.5, -1)
        saved.write(Checkpoint({}, "vql", state))
    older, newest = folder.names()
    assert (older[:8], newest[:8]) == ("00000003", "00000004")

    def away(*args: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION")

    with monkeypatch.context() as broken:
        broken.setattr("etl.stage.folder.pafs.copy_files", away)
        with pytest.raises(OSError, match="NETWORK_CONNECTION"):  # or the steps of a day would be taken again
            saved.newest()
        saved.write(Checkpoint({}, "vql", None))
    assert len(said) == 1 and "no checkpoint could be written" in said[0]
    folder.write_bytes(newest, b"cut short")
    assert saved.newest().state.step == 3
    assert f"/t/{newest}?" in said[1] and "is damaged" in said[1]


def test_lines_of_progress_are_followed_and_go_on_behind_those_of_before(folder, monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPLOADS", 0.05)
    monkeypatch.setattr(training.ray_workers, "FOLLOWING_SECONDS", 0.05)
    earlier = Progress(folder, prints=False)
    earlier("an earlier try")
    earlier.close()
    finished = threading.Event()
    follower = threading.Thread(target=training.ray_workers._follow, args=(folder, finished), daemon=True)
    follower.start()
    say = Progress(folder, prints=False)
    say("épreuve 1")
    wait_for("upload", lambda: "épreuve 1" in (folder.read_text(PROGRESS_FILE) or ""))
    say("the last")
    say.close()
    finished.set()
    follower.join()
    text = folder.read_text(PROGRESS_FILE) or ""
    assert [line.split(" ", 1)[1] for line in text.splitlines()] == ["an earlier try", "épreuve 1", "the last"]
    followed = capsys.readouterr().out
    assert followed.endswith("épreuve 1\n" + text.splitlines()[-1] + "\n")


def test_metrics_are_written_where_mlflow_does_not_take_them(folder, monkeypatch):
    sent: list[dict] = []
    buffer = MetricsBuffer("run", folder)

    def send(self: MetricsBuffer) -> None:
        sent.extend(self._pending)
        self._pending = []
        if self._in_file:
            self.folder.forget(METRICS_FILE)

    def down(self: MetricsBuffer) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(MetricsBuffer, "send", send)
    buffer.log({"loss": 0.9}, 0)
    assert not folder.exists(METRICS_FILE) and len(sent) == 1
    with monkeypatch.context() as broken:
        broken.setattr(MetricsBuffer, "send", down)
        buffer.log({"loss": 0.8}, 1)
        buffer.log({"loss": 0.7}, 2)
    assert len((folder.read_text(METRICS_FILE) or "").splitlines()) == 2
    assert MetricsBuffer("run", folder).flush()  # a later process sends what this one could not
    assert [row["step"] for row in sent] == [0, 1, 2] and not folder.exists(METRICS_FILE)


@pytest.mark.parametrize("where", ["bucket", "disk"])
def test_workers_find_the_package_of_a_warm_start_where_its_machine_is_gone(request, tmp_path, where):
    run = request.getfixturevalue("folder") if where == "bucket" else Folder(str(tmp_path / "shared"), "--runs")
    package = tmp_path / "downloaded"
    package.mkdir()
    for weights in (b"of a first try", b"of a retry"):
        (package / "model.safetensors").write_bytes(weights)
        address = within_reach(str(package), run, "warm_start")
    shutil.rmtree(package)
    with Folder(address, "--warm-start").read_locally("model.safetensors") as copy:
        assert copy.read_bytes() == weights
    for named in ("s3://bucket/package", str(package)):  # whoever reads it says that it is missing
        assert within_reach(named, run, "warm_start") == named
