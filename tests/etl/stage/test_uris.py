"""A secret in an address is refused wherever one is taken, and not repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from etl.datasets.definition import dataset
from etl.ingest.raw import RawLocation
from etl.stage.errors import StageError
from etl.stage.uris import below, without_secrets
from etl.warehouse.store import TableStore
from training.tracking import attempt_run

SECRET = "hunter2"
WITH_SECRETS = [
    f"s3://AKIA:{SECRET}@bucket/logs",
    f"s3://{SECRET}@bucket",
    f"s3://AKIA:ab/{SECRET}@bucket/logs?region=eu-central-1",
    f"s3://AKIA%3A{SECRET}%40bucket/x",
    f"https://me:{SECRET}@mlflow.example.org/",
    f"postgresql+psycopg2://airflow:{SECRET}@db:5432/mlflow",
    f"postgresql://db/mlflow?user=a&password={SECRET}",
    f"abfss://box:{SECRET}@account.dfs.core.windows.net/x",
    f"S3://AKIA:{SECRET}@bucket",
    f"https://store/x?sig={SECRET}",
    f"s3://bucket/x?secret_key={SECRET}",
]
WITHOUT = [
    "/data/a@b:c",
    "relative/x",
    "s3://bucket/logs/me@example.org",
    "s3://bucket/x?region=us-east-1&scheme=http&endpoint_override=127.0.0.1:9000",
    "http://127.0.0.1:5000",
    "http://[::1]:5000/x",
    "sqlite:////tmp/mlflow.db",
    "file:///tmp/x",
    "abfss://box@account.dfs.core.windows.net/x",
    "gs://bucket/a",
]


@pytest.mark.parametrize("address", WITH_SECRETS)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address: str) -> None:
    for take in (
        lambda: without_secrets(address, "RAW"),
        lambda: TableStore(address, "shop"),
        lambda: RawLocation(address),
    ):
        with pytest.raises(StageError, match="holds a user, a password or a key") as caught:
            take()
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", WITHOUT)
def test_an_address_without_one_stays_as_it_is(address: str) -> None:
    assert without_secrets(address, "RAW") == address


def test_no_output_of_a_stage_holds_a_secret(tmp_path: Path) -> None:
    bad = f"s3://AKIA:{SECRET}@bucket/x"
    partition = ["--dataset", "kuairand", "--dt", "2022-04-21", "--attempt", "a"]
    for warehouse, raw in ((bad, str(tmp_path)), (str(tmp_path), bad)):
        words = [sys.executable, "-m", "etl.jobs.events", *partition, "--warehouse", warehouse, "--raw", raw]
        done = subprocess.run(words, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
        assert SECRET not in done.stdout + done.stderr
        assert done.returncode == 2, done.stdout + done.stderr
    assert not list(tmp_path.rglob("*"))


def test_a_tracking_address_with_a_secret_is_no_server_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@127.0.0.1:9")
    with (
        pytest.raises(StageError, match="MLFLOW_TRACKING_URI gives") as caught,
        attempt_run(dataset("kuairand"), "2022-04-21", "a", {}),
    ):
        pass
    assert SECRET not in str(caught.value) + capsys.readouterr().out


@pytest.mark.parametrize(
    ("address", "folder"),
    [
        ("/raw", "/raw/shop"),
        ("s3://bucket", "s3://bucket/shop"),
        ("s3://bucket/raw/?region=eu&scheme=http", "s3://bucket/raw/shop?region=eu&scheme=http"),
        ("file:///raw", "file:///raw/shop"),
        ("/a?b", "/a?b/shop"),
    ],
)
def test_a_folder_within_an_address_stands_before_the_query(address: str, folder: str) -> None:
    assert below(address, "shop") == folder
