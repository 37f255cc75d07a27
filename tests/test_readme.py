"""Every command that README.md and docs/datasets.md show, as it stands there, in one new home: it ends as the page
says.

They run in the pages' order, each in what those before it left. `RULES` says of each what it needs and what has to come
of it; a command without a rule fails. The figures do not matter here, so the tiny configuration trains, and but for the
first run and the one on real rows by one worker. `make readme`
runs them.
"""

from __future__ import annotations

import functools
import gzip
import http.server
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pytest

from etl.datasets.simulate import Simulation, write_simulation
from etl.warehouse.partitions import MS_PER_DAY, day_number
from tests.processes import free_port
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
SMALL = Simulation(users=400, length_scale=0.02, items=1_000)
ROWS = re.compile(r"raw rows ([\d,]+) = ([\d,]+) events \+ ([\d,]+) duplicates \+ ([\d,]+) quarantined")


def commands_of(page: str, inline: bool) -> list[str]:
    """Return the commands of a page in its order.

    Lines of its bash blocks without their remarks, and `make ...` in its text.
    """
    found = []
    for block, word in re.findall(r"^```bash\n(.*?)^```|`(make [^`]+)`", (ROOT / page).read_text(), re.M | re.S):
        found += [line.split(" #")[0].strip() for line in block.splitlines()] + [" ".join(word.split())] * inline
    return [command for command in found if command]


COMMANDS = list(dict.fromkeys([*commands_of("README.md", True), *commands_of("docs/datasets.md", False)]))


class Home:
    """An empty home on ports of its own, and the commands that run in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("AIRFLOW", "LONGVIEW", "MLFLOW", "MAKE"))
        }
        self.env = inherited | {
            "PYTHONPATH": "",
            "LONGVIEW_HOME": str(folder / "home"),
            "LONGVIEW_AIRFLOW_PORT": str(free_port()),
            "LONGVIEW_MLFLOW_PORT": str(free_port()),
            "VENV": sys.prefix,
            "CONFIG": "tiny",
            "no_proxy": "127.0.0.1",
        }

    def run(self, command: str, **env: str) -> str:
        """Run a command in the repository; return what it said. Its exit code is 0."""
        process = subprocess.Popen(
            shlex.split(command),
            cwd=ROOT,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, error = process.communicate(timeout=3 * PATIENCE_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # `make run` then stops what it started
            process.communicate()
            raise
        assert process.returncode == 0, f"{command} ended with {process.returncode}\n{out[-8000:]}\n{error[-3000:]}"
        return out

    def registers(self, command: str, model: str, **env: str) -> int:
        """Run a partition; return its raw rows. They add up, and a model of it is registered."""
        said = self.run(command, **env)
        rows, *parts = (int(number.replace(",", "")) for number in ROWS.search(said).groups())
        assert rows == sum(parts) > 0, said
        assert re.search(rf"model +{model} version \d+, aliases: .*challenger", said), said
        assert "\ndone in " in said, said
        return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("readme"))
    yield made
    made.run("make down")


# ---- what commands need
# ------------------------------------------------------------------------------------------------


def absent(folder: str) -> None:
    if not (ROOT / folder).is_dir():
        pytest.skip(f"{folder} is not on this machine")


@functools.cache
def small_logs(folder: Path) -> Path:
    write_simulation(SMALL, folder / "small")
    return folder / "small"


def published(home: Home) -> str:
    """Serve an archive of KuaiRand-1K's layout on the loopback.

    Return a definition of that name whose archive it is.
    """
    site = home.folder / "site"
    site.mkdir()
    with tarfile.open(site / "KuaiRand-1K.tar.gz", "w:gz") as archive:
        for path in small_logs(home.folder).glob("*.csv"):
            archive.add(path, f"KuaiRand-1K/data/{path.name.replace('_sim', '_1k')}")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    definition = site / "kuairand_1k.yaml"
    definition.write_text(f"""
extends: kuairand
name: kuairand_1k
title: KuaiRand-1K
download:
  licence: none
  page: http://127.0.0.1/
  archives:
    - url: http://127.0.0.1:{server.server_address[1]}/KuaiRand-1K.tar.gz
      members: ['*/data/log_*.csv', '*/data/user_features_*.csv', '*/data/video_features_basic_*.csv']
""")
    return str(definition)


def user_behaviour(folder: Path, logs: Path) -> None:
    """Write UserBehavior.csv.

    Each click of the simulated logs is a view, some views a purchase, a cart or a favourite as well.
    """
    log = pa.concat_tables(pacsv.read_csv(path) for path in logs.glob("log_*.csv"))
    later_ms = (day_number("2017-12-03") - day_number(SMALL.first_dt) - SMALL.days + 1) * MS_PER_DAY
    log = log.filter(
        pc.and_(
            pc.equal(log["is_click"], 1),
            pc.greater_equal(pc.add(log["time_ms"], later_ms), day_number("2017-11-24") * MS_PER_DAY),
        )
    )
    seconds = pc.divide(pc.add(log["time_ms"], later_ms), 1000)
    category = pc.add(pc.bit_wise_and(log["video_id"], 31), 1)
    rows = pa.concat_tables(
        pa.table(
            {
                "user": log["user_id"],
                "item": log["video_id"],
                "category": category,
                "action": pa.array([action] * log.num_rows),
                "seconds": seconds,
            }
        ).filter(chosen)
        for action, chosen in (
            ("pv", pc.is_valid(seconds)),
            ("buy", pc.equal(log["is_like"], 1)),
            ("cart", pc.equal(log["is_comment"], 1)),
            ("fav", pc.equal(log["is_forward"], 1)),
        )
    )
    folder.mkdir()
    pacsv.write_csv(
        rows.sort_by([("user", "ascending"), ("seconds", "ascending")]),
        folder / "UserBehavior.csv",
        pacsv.WriteOptions(include_header=False, quoting_style="none"),
    )


# ---- what comes of them
# ------------------------------------------------------------------------------------------------


def simulated(home: Home, command: str) -> None:
    assert home.registers(command, "vql_kuairand_simulated") > 400_000


def download(home: Home, command: str) -> None:
    """The archive is on the loopback, under the name of the one that is published."""
    home.run(command.replace("kuairand_1k", published(home)))
    assert {path.suffix for path in (home.folder / "home/raw/kuairand_1k").rglob("*.csv")} == {".csv"}


def downloaded(home: Home, command: str) -> None:
    home.registers(command, "vql_kuairand_1k", WORKERS="1")


def real(home: Home, command: str) -> None:
    absent("../shared/data/kuairand")
    lines = 0
    for path in (ROOT / "../shared/data/kuairand").glob("log_*.csv.gz"):
        with gzip.open(path) as file:
            lines += sum(1 for _ in file) - 1
    assert home.registers(command, "vql_kuairand") == lines


def taobao(home: Home, command: str) -> None:
    user_behaviour(home.folder / "taobao", small_logs(home.folder))
    home.registers(command.replace("/data/taobao", str(home.folder / "taobao")), "vql_taobao", WORKERS="1")


def buildroot(home: Home, command: str) -> None:
    absent("../shared/data/gitlog_buildroot")
    # Of 9,010 days: each is published.
    few = {"LOOKBACK_DAYS": "400", "TARGET_DAYS": "300", "EVALUATION_DAYS": "120"}
    home.registers(command, "vql_buildroot", WORKERS="1", **few)


def up(home: Home, command: str) -> None:
    said = home.run(command)
    for port in (home.env["LONGVIEW_AIRFLOW_PORT"], home.env["LONGVIEW_MLFLOW_PORT"]):
        assert f"http://127.0.0.1:{port}" in said


def down(home: Home, command: str) -> None:
    assert "api-server" in home.run(command)


def targets(home: Home, command: str) -> None:
    said = home.run(command)
    for target in re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), re.M):
        assert f"make {target} " in said


def by_ci(home: Home, command: str) -> None:
    """The tests themselves, which no test runs: CI does, by the same command."""
    parts = re.search(r"for part in (.*); do", (ROOT / ".ci/run").read_text())[1].split()
    assert command.removeprefix("make ") in parts


RULES: dict[str, Callable[[Home, str], None]] = {
    "make run": simulated,
    "make test": by_ci,
    "make data DATASET=kuairand_1k": download,
    "make run DATASET=kuairand_1k DT=2022-04-21": downloaded,
    "make run RAW=../shared/data/kuairand DT=2022-04-21": real,
    "make run DATASET=docs/definitions/taobao.yaml RAW=/data/taobao DT=2017-12-03": taobao,
    "make run DATASET=docs/definitions/buildroot.yaml RAW=../shared/data/gitlog_buildroot DT=2026-08-22": buildroot,
    "make up": up,
    "make down": down,
    "make help": targets,
}


def test_every_command_has_a_rule() -> None:
    """Whoever shows a command says what comes of it."""
    assert len(COMMANDS) > 8, "the pages are not read rightly"
    assert [command for command in COMMANDS if command not in RULES] == []
    assert [command for command in RULES if command not in COMMANDS] == []


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages(home: Home, command: str) -> None:
    RULES[command](home, command)
