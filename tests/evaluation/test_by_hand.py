"""Promotion, refusal and rollback by a person, on a real registry: aliases, caches, records, and what follows."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow.exceptions import MlflowException

from etl.stage.errors import GateError, StageError, TryAgainError
from etl.stage.folder import Folder
from etl.warehouse.store import TableStore
from evaluation.gate import Decision
from evaluation.release import by_hand, promote
from evaluation.release.moves import Move, line_of, read_moves
from infra import settings
from tests.evaluation.conftest import (
    DATASET,
    DT,
    FIRST,
    NEXT_DT,
    SECOND,
    Stages,
    chain,
    in_same_process,
    judge_leniently,
    stages_below,
)
from tests.evaluation.mlflow_server import MlflowServer
from tests.waiting import wait_for
from training.registry import Registry
from training.scoring import load_scorer

THIRD = SECOND.replace("c0", "c1")
WHY = ("--by", "Ada", "--reason", "users complain")


def decide(stages, action: str, *more: str) -> None:
    place = ["--dataset", DATASET, "--warehouse", str(stages.warehouse), "--runs", str(stages.runs)]
    by_hand.main([action, *place, *more])


def aliases() -> dict[str, str]:
    """Return the aliases but for `challenger`, which no decision here moves."""
    return {name: version for name, version in Registry(DATASET).aliases().items() if name != "challenger"}


def cached_of(stages) -> dict[str, str]:
    """Return the day -> the version whose user caches are published."""
    store = TableStore(str(stages.warehouse), DATASET)
    found = {dt: store.require("user_caches", dt).settings["model_version"] for dt in store.days("user_caches")}
    return {dt: version.rpartition("/")[2] for dt, version in found.items()}


def tags(version: str) -> dict[str, str]:
    return Registry(DATASET).version(version).tags


@pytest.fixture(scope="module")
def three_at_rest(empty_database, tmp_path_factory) -> Path:
    """The folder of three champions, one after the other, the last two on one day; made once, copied for each test."""
    folder = tmp_path_factory.mktemp("three")
    shutil.copy(empty_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)
        judge_leniently(patch)
        in_same_process(patch)
        stages = stages_below(folder, patch)
        for seed, (attempt, dt) in enumerate(((FIRST, DT), (SECOND, NEXT_DT), (THIRD, NEXT_DT)), 1):
            chain(stages, attempt, dt, seed)
            stages.run("user_caches", attempt, dt)
    return folder


@pytest.fixture
def three(three_at_rest, tmp_path, monkeypatch, lenient, same_process) -> Stages:
    for name in ("warehouse", "runs", "raw"):
        shutil.copytree(three_at_rest / name, tmp_path / name)
    shutil.copy(three_at_rest / "mlflow.db", tmp_path)  # the files that it names stay where they are, and are read
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    stages = Stages(tmp_path / "warehouse", tmp_path / "runs", tmp_path / "raw", monkeypatch)
    assert aliases() == {"anchor": "1", "champion": "3", "previous_champion": "2"}
    assert cached_of(stages) == {DT: "1", NEXT_DT: "3"}
    return stages


def test_a_rollback_goes_to_the_champion_before_and_the_gate_judges_against_that(three, capsys):
    decide(three, "rollback", *WHY, "--dry-run")
    assert "would be: vql_kuairand_simulated version 2 is the champion again" in capsys.readouterr().out
    assert (aliases()["champion"], len(read_moves(Registry(DATASET)))) == ("3", 3)
    decide(three, "rollback", *WHY)
    assert aliases() == {"anchor": "1", "champion": "2", "previous_champion": "1"}
    assert cached_of(three) == {DT: "1", NEXT_DT: "2"}
    for version in ("2", "3"):
        said = {name: tags(version)[f"release.{name}"] for name in ("action", "by", "reason", "champion")}
        assert said == {
            "action": "rollback",
            "by": "Ada",
            "reason": "users complain",
            "champion": "version 3 to version 2",
        }
    # A late try of what was rolled back puts neither model nor caches back.
    for module in ("user_caches", "release.promote"):
        three.run(module, THIRD, NEXT_DT)
    assert (aliases()["champion"], cached_of(three)[NEXT_DT]) == ("2", "2")
    # The next day's gate meets the champion of now.
    fourth = SECOND.replace("c0", "c2")
    three.train(fourth, NEXT_DT, 4)
    three.run("evaluate", fourth, NEXT_DT)
    assert three.json(fourth, "evaluation")["champion"]["version"] == "2"
    # Once more, to the first, of another day; then there is none.
    decide(three, "rollback", *WHY)
    assert aliases() == {"anchor": "1", "champion": "1"}
    assert cached_of(three) == {DT: "1", NEXT_DT: "1"}
    with pytest.raises(StageError, match="there was no champion before version 1"):
        decide(three, "rollback", *WHY)
    capsys.readouterr()
    decide(three, "list")
    *lines, now = capsys.readouterr().out.splitlines()
    assert [line.split("Z  ")[1] for line in lines[-2:]] == [
        "rolled back  version 3 -> version 2  by Ada: users complain",
        "rolled back  version 2 -> version 1  by Ada: users complain",
    ]
    assert [line.split("  by ")[0].split("Z  ")[1] for line in lines[:-2]] == [
        "promoted     none -> version 1",
        "promoted     version 1 -> version 2",
        "promoted     version 2 -> version 3",
    ]
    assert now.startswith("anchor: version 1, challenger: version 3, champion: version 1")


def test_a_promotion_by_hand_is_what_later_models_are_measured_by_until_it_is_rolled_back(three):
    decide(three, "promote", "--version", "1", *WHY)
    assert aliases() == {"anchor": "1", "champion": "1", "previous_champion": "3"}
    decide(three, "promote", "--version", "2", *WHY)
    assert aliases() == {"anchor": "2", "champion": "2", "previous_champion": "1"}
    assert cached_of(three)[NEXT_DT] == "2"
    assert tags("2")["gate_reason"].startswith("promoted by Ada: users complain (before: lenient")
    assert "promoted by Ada: users complain" in Registry(DATASET).version("2").description  # its card
    decide(three, "rollback", *WHY)
    assert aliases() == {"anchor": "1", "champion": "1", "previous_champion": "3"}
    decide(three, "rollback", *WHY)
    assert aliases() == {"anchor": "1", "champion": "3", "previous_champion": "2"}


def test_what_is_refused_is_not_promoted_by_its_own_attempt_nor_rolled_back_to(three, capsys):
    with pytest.raises(StageError, match="version 3 is the champion"):
        decide(three, "refuse", "--version", "3", *WHY)
    fourth = SECOND.replace("c0", "c2")
    three.train(fourth, NEXT_DT, 4)
    for module in ("evaluate", "release.register"):
        three.run(module, fourth, NEXT_DT)
    decide(three, "refuse", "--version", "4", *WHY)
    three.run("release.promote", fourth, NEXT_DT)
    registration = three.json(fourth, "registration")
    assert (registration["outcome"], registration["gate"]["passed"]) == ("refused", False)
    assert registration["gate"]["reason"] == "refused by Ada: users complain"
    assert aliases()["champion"] == "3"
    decide(three, "refuse", "--version", "2", *WHY)
    with pytest.raises(StageError, match="version 2, the champion before, was refused by Ada: users complain"):
        decide(three, "rollback", *WHY)
    assert (aliases()["champion"], cached_of(three)[NEXT_DT]) == ("3", "3")
    capsys.readouterr()
    decide(three, "list")
    assert "refused      version 2  by Ada: users complain" in capsys.readouterr().out


def test_an_artifact_that_failed_in_a_fresh_process_is_promoted_only_if_that_is_asked_for(three, monkeypatch):
    """What the quality gate has refused never came to that gate: it is checked now, and not when its run is gone."""
    verdicts = iter((Decision(False, "it is slow"), Decision(True, "it runs")))
    monkeypatch.setattr(promote, "mechanical_gate", lambda *args: next(verdicts))
    monkeypatch.setattr(promote, "quality_gate", lambda evaluation, primary: Decision(False, "worse"))
    fourth = SECOND.replace("c0", "c2")
    chain(three, fourth, NEXT_DT, 4)
    asked = ("promote", "--version", "4", *WHY)
    for _ in range(2):  # the second time it is known
        with pytest.raises(GateError, match="has not passed the mechanical gate: failed: it is slow"):
            decide(three, *asked)
    assert aliases()["champion"] == "3"
    decide(three, *asked, "--despite-mechanical-gate")
    assert aliases() == {"anchor": "4", "champion": "4", "previous_champion": "3"}
    assert (tags("4")["promotion"], tags("4")["mechanical_gate"]) == ("promoted", "failed: it is slow")
    assert tags("4")["gate_reason"] == "promoted by Ada: users complain (before: worse)"
    decide(three, "rollback", *WHY)
    registry = Registry(DATASET)
    registry.client.delete_model_version_tag(registry.name, "4", "mechanical_gate")
    decide(three, *asked)
    assert (aliases()["champion"], tags("4")["mechanical_gate"]) == ("4", "passed: it runs")
    assert cached_of(three)[NEXT_DT] == "4"
    decide(three, "rollback", *WHY)
    registry.client.delete_model_version_tag(registry.name, "4", "mechanical_gate")
    shutil.rmtree(three.runs / fourth)
    with pytest.raises(StageError, match="has not come to the mechanical gate, and cannot any more"):
        decide(three, *asked)
    assert aliases()["champion"] == "3"


def test_the_champions_equal_and_the_champion_itself_move_nothing(three, capsys):
    chain(three, f"{THIRD}x", NEXT_DT, 3)
    before = aliases(), read_moves(Registry(DATASET))
    for version in ("3", "4"):
        decide(three, "promote", "--version", version, *WHY)
        assert f"version {version} NOT promoted, it is the champion's equal" in capsys.readouterr().out
    assert (aliases(), read_moves(Registry(DATASET))) == before


def test_a_decision_that_died_is_completed_under_its_name_and_never_taken_twice(three, monkeypatch):
    """Airflow's retry, and a clear of its task, repeat the command line."""
    mine = ("rollback", *WHY, "--decision", "manual__1")
    with monkeypatch.context() as dying:
        dying.setattr("mlflow.MlflowClient.set_registered_model_alias", _no_answer)
        with pytest.raises(TryAgainError):
            decide(three, *mine)
    assert (aliases()["champion"], len(read_moves(Registry(DATASET)))) == ("3", 4)
    # As if it had never been: another one goes to the same champion.
    with monkeypatch.context() as dying:
        dying.setattr(by_hand, "build_user_caches", _no_answer)
        with pytest.raises(MlflowException):
            decide(three, *mine)
    assert (aliases()["champion"], cached_of(three)[NEXT_DT]) == ("2", "3")
    for _ in range(2):
        decide(three, *mine)
        assert (aliases()["champion"], cached_of(three)[NEXT_DT]) == ("2", "2")
    decide(three, "refuse", "--version", "1", *WHY, "--decision", "manual__2")
    for version in ("3", "1"):  # back to what the first decision was about, too
        decide(three, "promote", "--version", version, *WHY)
        with pytest.raises(StageError, match=f"others have been taken since; version {version} is champion"):
            decide(three, *mine)
    with pytest.raises(StageError, match="others have been taken since"):
        decide(three, "refuse", "--version", "1", *WHY, "--decision", "manual__2")
    assert (aliases()["champion"], tags("1")["promotion"]) == ("1", "promoted")


def _no_answer(*args, **kwargs):
    raise MlflowException("API request failed with exception refused")


def test_a_rollback_that_died_before_its_move_does_not_stand_in_the_way_of_another(three, monkeypatch):
    with monkeypatch.context() as dying:
        dying.setattr("mlflow.MlflowClient.set_registered_model_alias", _no_answer)
        with pytest.raises(TryAgainError):
            decide(three, "rollback", *WHY)
    decide(three, "rollback", *WHY)
    assert aliases() == {"anchor": "1", "champion": "2", "previous_champion": "1"}


def test_under_another_label_or_other_fields_nothing_is_compared_until_a_person_promotes(three):
    registry, store = Registry(DATASET), TableStore(str(three.warehouse), DATASET)

    def warning(attempt: str) -> str:
        three.run("evaluate", attempt, NEXT_DT)
        return str(three.json(attempt, "evaluation")["champion"]["warning"])

    label = tags("3")["data.label"]
    registry.client.set_model_version_tag(registry.name, "3", "data.label", "is_like")
    assert warning(THIRD) == "None"  # of a retry the champion meant is the one before
    fourth, fifth = (SECOND.replace("c0", f"c{number}") for number in (2, 3))
    three.train(fourth, NEXT_DT, 4)
    assert warning(fourth) == f"it was trained for another task: data.label is_like, now {label}"
    assert "vql_minus_champion" not in three.json(fourth, "evaluation")["paired"]
    assert "vql_minus_anchor" in three.json(fourth, "evaluation")["paired"]  # which is of the same task
    registry.client.set_model_version_tag(registry.name, "3", "data.label", label)
    # Fields of the items and of the users that the champion knows, and the rows do not.
    items, sequences = (store.read(store.require(table, NEXT_DT)) for table in ("items", "sequences"))
    with pytest.raises(StageError, match="these items have no field author_id"):
        load_scorer(registry.package("3")).score(items.drop(["author_id"]), sequences)
    three.without_user_fields(NEXT_DT)
    three.train(fifth, NEXT_DT, 5)
    assert "StageError: these users have 0 fields, and the model was trained with" in warning(fifth)
    three.run("release.register", fifth, NEXT_DT)
    decide(three, "promote", "--version", "4", *WHY)
    assert aliases() == {"anchor": "4", "champion": "4", "previous_champion": "3"}


def test_an_anchor_that_was_deleted_since_is_replaced_by_the_champion_itself(three):
    Registry(DATASET).client.delete_model_version(f"vql_{DATASET}", "1")
    decide(three, "rollback", *WHY)
    assert aliases() == {"anchor": "2", "champion": "2"}
    with pytest.raises(StageError, match="version 1 of vql_kuairand_simulated is gone"):
        decide(three, "rollback", *WHY)


def test_an_alias_that_somebody_moved_by_other_means_is_no_ground_for_a_rollback(three, capsys):
    chain(three, f"{THIRD}x", NEXT_DT, 4)
    Registry(DATASET).client.delete_registered_model_tag(
        f"vql_{DATASET}", max(key for key in Registry(DATASET).tags() if key.startswith("release."))
    )
    with pytest.raises(StageError, match="no record says how version 4 became champion"):
        decide(three, "rollback", *WHY)
    decide(three, "list")
    assert "no record names version 4 as champion" in capsys.readouterr().out
    decide(three, "promote", "--version", "2", *WHY)  # by name, always
    assert aliases()["champion"] == "2"
    Registry(DATASET).client.delete_model_version(f"vql_{DATASET}", "4")
    with pytest.raises(StageError, match="version 4 of vql_kuairand_simulated is gone"):
        decide(three, "rollback", *WHY)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("promote", "--version", "2", "--by", "Ada"), "who takes it and why"),
        (("promote", "--version", "2", "--by", " ", "--reason", "better"), "who takes it and why"),
        (("promote", *WHY), "--version: which version to promote?"),
        (("refuse", *WHY), "--version: which version to refuse?"),
        (("rollback", "--version", "2", *WHY), "a rollback goes to the champion before"),
        (("rollback", *WHY), "has no champion to roll back"),
        (("promote", "--version", "2", *WHY), "cannot do that|is gone"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_argument_that_is_wrong(stages, words, says):
    with pytest.raises(StageError, match=says):
        decide(stages, *words)


def test_a_decision_waits_for_the_promotion_at_work_and_says_so(tmp_path, capsys):
    runs, done = Folder(str(tmp_path), "--runs"), threading.Event()

    def other() -> None:
        with promote.alone(runs, DATASET):
            done.set()

    with promote.alone(runs, DATASET):
        waiting = threading.Thread(target=other, daemon=True)
        waiting.start()
        said: list[str] = []
        wait_for("the word", lambda: said.append(capsys.readouterr().out) or "is at work: waiting" in "".join(said))
        assert not done.is_set()
    waiting.join()
    assert done.is_set()


class Receiver(http.server.BaseHTTPRequestHandler):
    """Gets webhooks, with their headers."""

    got: ClassVar[list[tuple[dict[str, str], bytes]]] = []

    def do_POST(self) -> None:
        self.got.append((dict(self.headers.items()), self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(three, tmp_path, monkeypatch) -> Iterator[tuple[MlflowServer, str]]:
    """A real MLflow server over what `three` has, and the address of a receiver of webhooks."""
    from cryptography.fernet import Fernet

    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv("MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY", Fernet.generate_key().decode())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    server = MlflowServer(tmp_path / "mlflow.db")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server, f"http://127.0.0.1:{receiver.server_port}/champion"
    server.close()
    receiver.shutdown()
    receiver.server_close()


@pytest.mark.slow
def test_a_rollback_over_a_killed_server_is_one_rollback_and_a_webhook_tells_of_it(three, served):
    server, address = served
    page = (settings.ROOT / "docs" / "evaluation.md").read_text()
    subscribe, check = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    Registry(DATASET)  # which points MLflow's client at the server
    exec(subscribe.replace("https://example.com/champion", address), {})
    mine = ("rollback", *WHY, "--decision", "manual__1")
    for answered in (False, True):
        server.kill_at("/registered-models/alias", '"champion"', answered=answered)
        with pytest.raises(TryAgainError):
            decide(three, *mine)
        assert server.killed_at
        with pytest.raises(TryAgainError):
            decide(three, *mine)  # it is still away
        server.start()
    decide(three, *mine)
    assert aliases() == {"anchor": "1", "champion": "2", "previous_champion": "1"}
    assert [move.action for move in read_moves(Registry(DATASET))].count("rollback") == 1
    assert cached_of(three)[NEXT_DT] == "2"
    decide(three, "promote", "--version", "3", *WHY)

    def told() -> list[tuple[dict[str, str], bytes]]:
        return [one for one in Receiver.got if json.loads(one[1])["data"]["alias"] == "champion"]

    [*_, (headers, body)] = wait_for("the webhook", lambda: [one for one in told() if b'"version": "3"' in one[1]])
    said = json.loads(body)
    assert (said["entity"], said["action"]) == ("model_version_alias", "created")
    assert said["data"] == {"name": f"vql_{DATASET}", "alias": "champion", "version": "3"}
    receiver: dict[str, Any] = {}
    exec(check, receiver)
    assert receiver["is_ours"](headers, body, "a long one of your own")
    assert not receiver["is_ours"](headers, body + b" ", "a long one of your own")


def move(action: str, version: str, champion: str | None, anchor: str | None = None) -> Move:
    return Move("d", "t", action, version, "b", "r", champion, anchor, anchor, None)


UP = [move("promote", "1", None), move("promote", "2", "1"), move("promote", "3", "2")]


@pytest.mark.parametrize(
    ("moves", "champion", "line"),
    [
        ([], "1", ""),
        (UP, "3", "1 2 3"),
        ([*UP, move("rollback", "2", "3")], "2", "1 2"),
        ([*UP, move("rollback", "2", "3")], "3", "1 2 3"),  # it was not carried out
        ([*UP, move("rollback", "2", "3"), move("rollback", "2", "3")], "2", "1 2"),
        ([*UP, move("rollback", "2", "3"), move("promote", "4", "2")], "4", "1 2 4"),
        ([*UP, move("promote", "2", "3")], "2", "1 2 3 2"),
        ([*UP, move("promote", "2", "3"), move("rollback", "3", "2")], "3", "1 2 3"),
        ([*UP, move("refuse", "9", "3")], "3", "1 2 3"),
        (UP, "2", "1 2"),  # the last one died, or its alias was put back by other means
        (UP, "7", ""),
        (UP, None, ""),
        ([*UP, move("promote", "8", "7")], "8", "7 8"),  # 7 was set by other means
        ([move("promote", "6", "5")], "6", "5 6"),  # the first record of an older registry
    ],
)
def test_the_line_of_champions(moves, champion, line):
    assert [served.version for served in line_of(moves, champion)] == line.split()
