"""The mechanical gate: what it stops, odd requests, and the environment of a model's own requirements."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from etl.stage.errors import StageError, TryAgainError
from evaluation.release import model_environment
from evaluation.release.mechanical_gate import LONG_HISTORY, Asked, judged, odd_requests, pace
from evaluation.release.model_environment import RequirementsUnmet, environment_of
from infra import settings
from infra.local.services import http_ok
from tests.evaluation.conftest import DATASET, FIRST, NEXT_DT, SECOND, chain
from tests.processes import free_port, start
from tests.training.conftest import random_partition, vocabulary_of
from tests.waiting import wait_for
from training.config import ModelConfig
from training.data import Sequences
from training.model.ranker import FieldSizes, Ranker
from training.package import Cutoff
from training.registry import Registry
from training.scoring import Scorer, load_scorer, request_of

EXPECTED = np.array([0.25, 0.5])
HISTORY = {"history_item_id": [1] * 500}
ASKED = [
    Asked("user 1 of the day", HISTORY, EXPECTED, timed=True),
    Asked("user 2 of the day", HISTORY, EXPECTED[::-1], timed=True),
    Asked("an empty history", {}, EXPECTED),
]
SOUND = {
    "requests": [{"scores": [0.25, 0.5]}, {"scores": [0.5, 0.25]}, {"scores": [0.25, 0.5]}],
    "together": {"scores": [0.25, 0.5, 0.5, 0.25]},
    "seconds": [0.008, 0.012],
    "own_code": True,
    "pickles": [],
}


def found(place: int | None = None, answer: dict | None = None, **changes) -> dict:
    result = copy.deepcopy(SOUND) | changes
    if place is not None:
        result["requests"][place] = answer
    return result


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (found(1, {"scores": [0.501, 0.25]}), "user 2 of the day: the artifact differs by 0.001 "),
        (found(1, {"scores": [float("nan"), 0.25]}), "user 2 of the day: 1 of 2 scores are no probabilities"),
        (found(2, {"scores": [0.25, 1.5]}), "an empty history: 1 of 2 scores are no probabilities"),
        (found(0, {"scores": [0.25]}), "user 1 of the day: 1 scores for 2 candidates"),
        (found(2, {"error": "IndexError: 0"}), "an empty history: it cannot be scored: IndexError: 0"),
        (
            found(together={"scores": [0.5, 0.25, 0.25, 0.5]}),
            "several users in one call: the artifact differs by 0.25 ",
        ),
        (found(seconds=[0.1, 0.14]), "too slow: 120.0 ms a request, budget 110 ms"),
        (found(own_code=False), "code from elsewhere"),
        (found(pickles=["a.pkl"]), "holds pickles: a.pkl"),
    ],
)
def test_each_fault_is_stopped_and_named(given, says):
    decision = judged(ASKED, given)
    assert not decision.passed and says in decision.reason


def test_a_sound_artifact_passes_and_long_histories_may_take_longer():
    decision = judged(ASKED, SOUND)
    assert decision.passed and decision.reason == "the same 6 scores within 0; 10.0 ms a request, budget 110 ms"
    long = [replace(one, request={"history_item_id": [1] * 10_000}) for one in ASKED]
    assert judged(long, found(seconds=[0.28, 0.3])).passed


def test_what_the_training_itself_cannot_score_is_no_artifact_to_promote():
    asked = [*ASKED[:2], Asked("an empty history", {}, None, failure="IndexError: 0")]
    assert "an empty history: it cannot be scored: IndexError: 0" in judged(asked, SOUND).reason


def test_ten_times_slower_than_the_champion_is_stopped_and_one_slow_moment_is_not():
    champion = [0.008, 0.012, 0.009, 0.02]
    slow = pace([10 * seconds for seconds in champion], champion, "3")
    assert not slow.passed
    assert slow.reason == ("a request takes 10.0 times as long as champion version 3 takes for it, more than 3 times")
    assert pace([0.016, 0.024, 0.018, 0.04], champion, "3").passed  # the noise of a busy machine
    assert pace([0.008, 0.5, 0.009, 0.02], champion, "3").passed


@pytest.fixture(scope="module")
def scorer() -> tuple[Scorer, dict]:
    """A model of random weights whose targets see 60 events, and a request of one of its users."""
    items, sequences = random_partition(users=6)
    flat = Sequences.from_arrow(sequences)
    vocabulary = vocabulary_of(items, flat)
    torch.manual_seed(1)
    model = Ranker(FieldSizes.of(vocabulary), ModelConfig(interest="vql", codes=16)).eval()
    model.coded.quantizer.started.fill_(1)
    return Scorer(Path(), model, vocabulary, Cutoff(max_events=60)), request_of(items, flat, 2)


def test_odd_requests_are_scored_one_probability_a_candidate(scorer):
    model, golden = scorer
    for without_history in (False, True):
        history = [name for name in golden if name.startswith("history_")]
        asked = odd_requests(golden | ({name: [] for name in history} if without_history else {}), 60)
        assert [re.sub(r"[\d,]+", "N", name) for name in asked] == [
            "unknown items",
            "an empty history",
            "N events",
            "N candidates",
        ]
        for name, request in asked.items():
            scores = model.score_request(request)
            assert len(scores) == len(request["target_item_id"]) and ((scores > 0) & (scores < 1)).all(), name
        long = asked[f"{LONG_HISTORY:,} events"]
        assert {len(long[name]) for name in history} == {LONG_HISTORY}
        assert (np.diff(long["history_time_ms"]) > 0).all() and long["history_time_ms"][-1] < min(
            long["target_time_ms"]
        )


def test_the_long_request_is_longer_than_what_training_saw(scorer):
    _, golden = scorer
    assert "400,000 events" in odd_requests(golden, 200_000)


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A logged model's files, and an index that has `tiny` 1.0 alone."""
    wheels, folder = tmp_path / "wheels", tmp_path / "model"
    wheels.mkdir()
    folder.mkdir()
    with zipfile.ZipFile(wheels / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny.py", "")
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "tiny.py,,\n")
    (folder / "requirements.txt").write_text("tiny==1.0\n")
    (folder / "python_env.yaml").write_text(f"python: {'.'.join(map(str, sys.version_info[:3]))}\n")
    for name in ("UV", "PIP"):
        monkeypatch.setenv(f"{name}_FIND_LINKS", str(wheels))
        monkeypatch.setenv(f"{name}_NO_INDEX", "1")
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(settings.MODEL_ENVIRONMENT, raising=False)
    return folder


def imports_tiny(python: Path) -> bool:
    return subprocess.run([str(python), "-P", "-c", "import tiny"], capture_output=True, check=False).returncode == 0


def test_an_environment_holds_the_requirements_alone_and_is_made_once(model, monkeypatch):
    made = environment_of(model)
    assert imports_tiny(made.python) and not imports_tiny(Path(sys.executable))
    assert "numpy" not in str(list(made.python.parents[1].rglob("site-packages/*")))
    assert made.described == "an environment of its own 1 pinned requirements"
    marked = made.python.with_name("marked")
    marked.touch()
    assert environment_of(model) == made and marked.exists()
    # One that was killed while it was made is made anew.
    (made.python.parents[1] / model_environment.MADE).unlink()
    assert environment_of(model) == made and not marked.exists() and imports_tiny(made.python)
    monkeypatch.setattr(model_environment, "_uv", lambda: "/no/uv")  # pip takes minutes where uv takes seconds
    (model / "requirements.txt").write_text("tiny\n")
    assert imports_tiny(environment_of(model).python)


def test_requirements_that_no_index_has_are_the_models_fault_and_a_silent_index_is_not(model, monkeypatch):
    (model / "requirements.txt").write_text("tiny==1.0+cpu\n")
    for uv in (model_environment._uv(), "/no/uv"):
        with monkeypatch.context() as patch, pytest.raises(RequirementsUnmet, match=r"tiny==1\.0\+cpu"):
            patch.setattr(model_environment, "_uv", lambda path=uv: path)
            environment_of(model)
    for name in ("UV_FIND_LINKS", "PIP_FIND_LINKS", "UV_NO_INDEX", "PIP_NO_INDEX"):
        monkeypatch.delenv(name)
    for name in ("UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    with pytest.raises(TryAgainError, match=r"LONGVIEW_MODEL_ENVIRONMENT=pipeline") as raised:
        environment_of(model)
    assert "127.0.0.1:9" in raised.value.what
    assert not list(settings.model_environments().glob("[!.]*"))


def test_the_pipelines_environment_is_taken_only_if_that_is_asked_for_and_is_said(model, monkeypatch):
    monkeypatch.setenv(settings.MODEL_ENVIRONMENT, "pipeline")
    taken = environment_of(model)
    assert str(taken.python) == sys.executable and "its own requirements NOT checked" in taken.described
    monkeypatch.setenv(settings.MODEL_ENVIRONMENT, "mine")
    with pytest.raises(StageError, match="LONGVIEW_MODEL_ENVIRONMENT='mine' is unknown"):
        environment_of(model)
    monkeypatch.delenv(settings.MODEL_ENVIRONMENT)
    (model / "python_env.yaml").write_text("python: '2.7.18'\n")
    with pytest.raises(StageError, match=r"asks for Python 2\.7"):
        environment_of(model)


@pytest.mark.slow
def test_in_an_environment_of_its_own_a_version_passes_serves_and_stops_one_that_is_ten_times_slower(
    stages, lenient, monkeypatch, tmp_path
):
    monkeypatch.setenv("LONGVIEW_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(settings.MODEL_ENVIRONMENT)
    chain(stages, FIRST)
    gate = stages.json(FIRST, "registration")["gate"]
    assert gate["passed"] and "artifact in an environment of its own 6 pinned requirements" in gate["reason"], gate
    assert "no champion to compare the time with" in gate["reason"]
    stages.train(SECOND, NEXT_DT, seed=2)
    for module in ("evaluate", "release.register"):
        stages.run(module, SECOND, NEXT_DT)
    code = Registry(DATASET).files("2") / "served_model.py"
    slow = "import time\n        time.sleep(0.05)\n        requests = model_input"
    code.write_text(code.read_text().replace("requests = model_input", slow))
    stages.run("release.promote", SECOND, NEXT_DT)
    gate = stages.json(SECOND, "registration")["gate"]
    assert not gate["passed"] and "times as long as champion version 1 takes for it" in gate["reason"], gate
    assert Registry(DATASET).aliases()["champion"] == "1"
    served_as_documented(Registry(DATASET), tmp_path)


def served_as_documented(registry: Registry, folder: Path) -> None:
    """Run the command of the page, and send its request: the answer is what the package gives."""
    page = (settings.ROOT / "docs" / "evaluation.md").read_text()
    [command] = re.findall(r"^mlflow (models serve .*)$", page, re.MULTILINE)
    [text] = re.findall(r'^\{"dataframe_records".*?^\]\}$', page, re.MULTILINE | re.DOTALL)
    port, asked = free_port(), json.loads(text)
    [request] = asked["dataframe_records"]
    scorer = load_scorer(registry.package("1"))
    request["user_fields"] = request["user_fields"][: len(scorer.example_request()["user_fields"])]  # of these rows
    words = command.replace("vql_kuairand@", f"{registry.name}@").replace("5001", str(port)).split()
    env = os.environ | model_environment.links_of_pip() | {"MLFLOW_ENV_ROOT": str(folder / "environments")}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    server = start([sys.executable, "-m", "mlflow", *words], folder / "serve.log", folder, env)
    try:
        wait_for("answer of the served model", lambda: http_ok(f"http://127.0.0.1:{port}/ping"))
        sent = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        answer = json.loads(urllib.request.urlopen(sent).read())
    finally:
        server.stop()
    [prediction] = answer["predictions"]
    assert prediction["scores"] == pytest.approx(scorer.score_request(request), abs=1e-4)
