"""The mechanical gate: the registered artifact, run as a stranger would run it, does what the evaluation measured.

It runs in an environment made of its own requirements, with its own code, away from the repository: requests of the day
score as in the evaluation, odd requests score as in the training's own package, and none takes too long.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from etl.stage.errors import StageError, TryAgainError
from etl.stage.folder import Folder
from etl.warehouse.store import TableStore
from evaluation.day_scores import DayScores
from evaluation.evaluate import package_of
from evaluation.gate import Decision
from evaluation.release.model_environment import RequirementsUnmet, environment_of
from training.data import Sequences
from training.registry import CHAMPION, ArtifactGone, Registry
from training.scoring import Scorer, load_scorer, request_of

USERS_CHECKED = 4
FRESH_PROCESS_SECONDS = 300
ROUNDS = 10  # times that each timed request is sent; the fastest counts, which other work on the machine touches least
LONG_HISTORY = 100_000
MANY_CANDIDATES = 1_000


@dataclass(frozen=True)
class Limits:
    """What the mechanical gate asks; all of its figures stand here.

    Attributes:
        score_difference: two scores of one request are the same within this.
        request_ms, thousand_events_ms: budget of a request of the day in one thread: so much, and so much more for each
            thousand events of its history. VQL and exact attention of the default's size took 10 and 7 ms for 500
            events and 20 candidates, 62 and 34 ms for 10,000, on a core that others used as well.
        times_the_champion: a request takes at most so many times as long as the champion takes for it. Twice is what a
            busy machine can come to between two processes, ten times is a fault.
    """

    score_difference: float = 1e-4
    request_ms: float = 100.0
    thousand_events_ms: float = 20.0
    times_the_champion: float = 3.0


@dataclass(frozen=True)
class Asked:
    """A request, what it stands for, and the scores that it has to come to.

    Attributes:
        expected: float [candidates]; None: this process could not score it either, for the reason in `failure`.
        timed: it is one of the day's, whose time counts.
    """

    name: str
    request: Mapping[str, Any]
    expected: np.ndarray | None
    timed: bool = False
    failure: str = ""


def mechanical_gate(
    store: TableStore, dt: str, run_dir: Folder, training: Mapping, registry: Registry, version: str
) -> Decision:
    """Run the registered artifact in its own environment and compare it with the evaluation and the champion.

    Raises:
        TryAgainError: it cannot be had now, or this machine has no package index, time or memory for it: that says
            nothing of the artifact.
    """
    primary = training["primary"]
    with package_of(training["models"][primary]) as package:
        asked = _requests(store, dt, run_dir, primary, load_scorer(package))
    try:
        model = registry.files(version)
        environment = environment_of(model)
        found = _run(model, environment.python, asked)
    except ArtifactGone as gone:
        return Decision(False, str(gone))
    except RequirementsUnmet as unmet:
        return Decision(False, f"no environment can be made of the artifact's own requirements: {unmet}")
    except subprocess.CalledProcessError as error:
        return _refused_by(error, registry, version)
    decision = judged(asked, found)
    if not decision.passed:
        return decision
    pace = _against_champion(registry, version, model, asked, found)
    reason = f"artifact in {environment.described}: {decision.reason}; {pace.reason}"
    return Decision(pace.passed, reason if pace.passed else pace.reason)


def judged(asked: Sequence[Asked], found: Mapping, limits: Limits = Limits()) -> Decision:
    """Decide from what a fresh process found (`fresh_scores.py`): its code, its scores, the time of a request."""
    if not found["own_code"]:
        return Decision(False, "the artifact runs code from elsewhere instead of its own")
    if found["pickles"]:
        return Decision(False, f"the artifact holds pickles: {', '.join(found['pickles'])}")
    together = np.concatenate([np.zeros(0), *(one.expected for one in asked if one.timed and one.expected is not None)])
    several = Asked("several users in one call", {}, together)
    worst = 0.0
    for one, answer in zip([*asked, several], [*found["requests"], found["together"]], strict=True):
        if one.expected is None or "error" in answer:
            return Decision(False, f"{one.name}: it cannot be scored: {answer.get('error') or one.failure}")
        scores = np.asarray(answer["scores"], dtype=np.float64)
        if len(scores) != len(one.expected):
            return Decision(False, f"{one.name}: {len(scores)} scores for {len(one.expected)} candidates")
        if not ((scores >= 0) & (scores <= 1)).all():
            return Decision(False, f"{one.name}: {_odd(scores)} of {len(scores)} scores are no probabilities")
        difference = float(np.abs(scores - one.expected).max(initial=0.0))
        if not difference <= limits.score_difference:
            return Decision(False, f"{one.name}: the artifact differs by {difference:.2g} from what was evaluated")
        worst = max(worst, difference)
    events = np.array([len(one.request["history_item_id"]) for one in asked if one.timed])
    took, budget = 1000 * np.asarray(found["seconds"]), limits.request_ms + limits.thousand_events_ms * events / 1000
    middle = f"{np.median(took):,.1f} ms a request, budget {np.median(budget):,.0f} ms"
    if not np.median(took / budget) <= 1:
        return Decision(False, f"too slow: {middle}")
    number = sum(len(one.expected) for one in asked if one.expected is not None)
    return Decision(True, f"the same {number} scores within {worst:.1g}; {middle}")


def pace(mine: Sequence[float], champions: Sequence[float], version: str, limits: Limits = Limits()) -> Decision:
    """Compare the times of the same requests, seconds each: the middle one of the ratios counts."""
    ratio = float(np.median(np.asarray(mine) / np.asarray(champions)))
    passed = ratio <= limits.times_the_champion
    return Decision(
        passed,
        f"a request takes {ratio:.1f} times as long as champion version {version} takes for it"
        + ("" if passed else f", more than {limits.times_the_champion:.0f} times"),
    )


def odd_requests(golden: Mapping[str, Any], max_events: int | None) -> dict[str, dict]:
    """Return requests that service brings and a day's users need not: name -> request, made from one of the day.

    Args:
        max_events: events that a target sees at most; None: no bound.
    """
    times, candidates = golden["history_time_ms"], len(golden["target_item_id"])
    last = times[-1] if times else golden["target_time_ms"][0] - 1
    long = max(LONG_HISTORY, 2 * (max_events or 0))
    events = np.resize(np.asarray(golden["history_item_id"] or golden["target_item_id"]), long)
    signals = {
        name: np.resize(np.asarray(golden[name] or [0]), long).tolist()
        for name in ("history_feedback", "history_watch_bucket")
    }
    unknown = lambda name: [-(10**12) - place for place in range(len(golden[name]))]  # noqa: E731
    history = ("history_item_id", "history_time_ms", *signals)
    targets = ("target_item_id", "target_time_ms", "target_context")
    many = {name: np.resize(np.asarray(golden[name]), MANY_CANDIDATES).tolist() for name in targets if candidates}
    return {
        "unknown items": {**golden, **{name: unknown(name) for name in ("history_item_id", "target_item_id")}},
        "an empty history": {**golden, **{name: [] for name in history}},
        f"{long:,} events": {
            **golden,
            **signals,
            "history_item_id": events.tolist(),
            "history_time_ms": [last - 60_000 * (long - 1 - place) for place in range(long)],
        },
        f"{MANY_CANDIDATES:,} candidates": {**golden, **many},
    }


def _requests(store: TableStore, dt: str, run_dir: Folder, primary: str, scorer: Scorer) -> list[Asked]:
    """Return requests of some users of the day, with the scores that the evaluation had for them, then others with
    those of the training's package."""
    items, evaluated = store.read(store.require("items", dt)), DayScores(run_dir)
    owner_T, column_T = evaluated.column("user_id"), evaluated.column(primary)
    user_ids, first, count = np.unique(owner_T, return_index=True, return_counts=True)
    # Spread over the users, the one with the most targets among them.
    spread = np.linspace(0, len(user_ids) - 1, min(USERS_CHECKED, len(user_ids))).astype(int)
    chosen = np.unique(np.append(spread, count.argmax()))
    sequences = Sequences.from_arrow(_rows_of(store, dt, user_ids[chosen]))
    rows = {int(user): row for row, user in enumerate(sequences.user_id)}
    asked = []
    for user in chosen:
        request = request_of(items, sequences, rows[int(user_ids[user])])
        expected = column_T[first[user] : first[user] + len(request["target_item_id"])]
        asked.append(Asked(f"user {user_ids[user]} of the day", request, expected, timed=True))
    longest = max((one.request for one in asked), key=lambda request: len(request["history_item_id"]))
    others = {"its input example": scorer.example_request(), **odd_requests(longest, scorer.cutoff.max_events)}
    return asked + [_scored_here(scorer, name, request) for name, request in others.items()]


def _rows_of(store: TableStore, dt: str, users: np.ndarray) -> pa.Table:
    """Return the rows of `sequences` of some users, from the files that have them."""
    found = []
    for file in store.require("sequences", dt).files:
        is_wanted = np.isin(store.read_file(file, ["user_id"])["user_id"].to_numpy(), users)
        if is_wanted.any():
            found.append(store.read_file(file).filter(pa.array(is_wanted)))
    return pa.concat_tables(found)


def _scored_here(scorer: Scorer, name: str, request: dict) -> Asked:
    try:
        return Asked(name, request, scorer.score_request(request))
    except Exception as error:
        return Asked(name, request, None, failure=f"{type(error).__name__}: {error}"[:300])


def _against_champion(
    registry: Registry, version: str, model: Path, asked: Sequence[Asked], found: Mapping
) -> Decision:
    """Send the day's requests to the champion, in its own environment, on this machine and now.

    What looks too slow is measured once more, both of them: one of the two may have met other work.
    """
    champion = registry.aliases().get(CHAMPION)
    if champion in (None, version):
        return Decision(True, "no champion to compare the time with")
    timed = [one for one in asked if one.timed]
    seconds = found["seconds"]
    try:
        theirs = registry.files(champion)
        python = environment_of(theirs).python
        for _ in range(2):
            champions = _run(theirs, python, timed)
            if any("error" in answer for answer in champions["requests"]):
                raise ArtifactGone(next(a["error"] for a in champions["requests"] if "error" in a))
            decision = pace(seconds, champions["seconds"], champion)
            if decision.passed:
                break
            seconds = _run(model, environment_of(model).python, timed)["seconds"]
        return decision
    except TryAgainError:
        raise
    except (ArtifactGone, RequirementsUnmet, StageError, subprocess.CalledProcessError) as error:
        # Its fault is none of the challenger's, which may be the remedy.
        why = getattr(error, "stderr", None) or getattr(error, "what", error)
        last = str(why).strip().splitlines()[-1][:200]
        return Decision(True, f"time NOT compared with champion version {champion}, which does not run: {last}")


def _odd(scores: np.ndarray) -> int:
    return int((~((scores >= 0) & (scores <= 1))).sum())


def _run(model: Path, python: Path, asked: Sequence[Asked]) -> dict:
    """Score requests in a fresh process.

    Raises:
        subprocess.CalledProcessError: the artifact does not run.
        TryAgainError: it takes too long altogether.
    """
    # One thread: a time says the same however many cores are free.
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_RUN_ID")}
    timed = [place for place, one in enumerate(asked) if one.timed]
    question = {"requests": [dict(one.request) for one in asked], "timed": timed, "rounds": ROUNDS}
    with tempfile.TemporaryDirectory() as folder:
        asked_file, scores_file = Path(folder) / "requests.json", Path(folder) / "scores.json"
        asked_file.write_text(json.dumps(question))
        script = Path(__file__).with_name("fresh_scores.py")
        try:
            subprocess.run(
                [str(python), "-P", str(script), str(model), str(asked_file), str(scores_file)],
                cwd=folder,
                check=True,
                env=env | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": folder},
                capture_output=True,
                text=True,
                timeout=FRESH_PROCESS_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise TryAgainError(
                f"the artifact in {model} did not score {len(asked)} requests within {FRESH_PROCESS_SECONDS} s",
                "run evaluation.release.promote again on a less busy machine",
            ) from error
        return json.loads(scores_file.read_text())


def _refused_by(error: subprocess.CalledProcessError, registry: Registry, version: str) -> Decision:
    """Return what a fresh process that failed says of the artifact.

    Raises:
        TryAgainError: it says nothing of it.
    """
    detail = (error.stderr.strip().splitlines() or [str(error)])[-1]
    if error.returncode == -signal.SIGKILL:  # a machine without memory
        what = f"version {version} of {registry.name} could not be run in a fresh process: {detail}"
        raise TryAgainError(what, "run evaluation.release.promote again") from error
    return Decision(False, f"the artifact does not run in a fresh process: {detail}")
