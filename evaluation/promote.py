"""Two gates, then one move of the alias `champion`: quality against the champion, and the exported artifact in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from etl.cli import definition_of, log, partition_parser, run_stage, store_of
from etl.errors import StageError
from etl.store import TableStore
from evaluation.gate import Decision, quality_gate
from evaluation.main import read_training, write_json
from evaluation.register import read_evaluation, request_frame
from training.data import Sequences
from training.registry import CHAMPION, PREVIOUS_CHAMPION, Registry, unreachable
from training.scoring import load_scorer, request_of

SCORE_TOLERANCE = 1e-4
USERS_CHECKED = 4
FRESH_PROCESS_SECONDS = 300


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--runs", required=True, help="folder of runs; this one reads and writes <runs>/<attempt>/")
    args = parser.parse_args()
    definition_of(args)
    store = store_of(args)
    run_dir = Path(args.runs).absolute() / args.attempt
    training, evaluation = read_training(run_dir), read_evaluation(run_dir)
    registry = Registry(args.dataset)
    version = registry.version_of_attempt(args.attempt)
    if version is None:
        raise StageError(f"attempt {args.attempt} has registered no version of {registry.name}", "run evaluation.register with the same --attempt first")
    tags = registry.version(version).tags
    if tags["validation_status"] != "pending":
        decision = Decision(tags["validation_status"] == "passed", tags["gate_reason"])
        log(f"already decided: {decision.reason}")
    else:
        decision = quality_gate(evaluation, training["primary"])
        if decision.passed:
            mechanical = mechanical_gate(store, args.dt, run_dir, training["primary"], Path(training["models"][training["primary"]]["package"]),
                                         f"models:/{registry.name}/{version}", registry.uri)
            decision = Decision(mechanical.passed, f"{decision.reason}; {mechanical.reason}" if mechanical.passed else mechanical.reason)
        try:
            apply(registry, version, decision, evaluation["champion"])
        except StageError:
            raise
        except Exception as error:
            raise unreachable(registry.uri, error) from error
    aliases = registry.aliases_of(version)
    path = run_dir / "registration.json"
    registration = json.loads(path.read_text()) if path.exists() else {"model_name": registry.name, "version": version, "run_id": training["mlflow_run_id"]}
    write_json(path, registration | {"aliases": aliases, "gate": decision.to_dict()})
    log(f"{registry.name} version {version} {'promoted' if decision.passed else 'NOT promoted, stays challenger'}: {decision.reason}")


def apply(registry: Registry, version: str, decision: Decision, judged_against: dict | None) -> None:
    """Write the decision on the version and, when it passed, move the aliases; the champion's move is one call, the last.

    A try that died anywhere in here is repeated safely: `validation_status` leaves `pending` after the move.

    Raises:
        StageError: the champion is not the one that the evaluation compared with.
    """
    champion = registry.aliases().get(CHAMPION)
    expected = judged_against["version"] if judged_against else None
    if decision.passed and champion not in (expected, version):
        raise StageError(f"the champion of {registry.name} is version {champion}, but the evaluation compared with {expected or 'none'}",
                         "run evaluation.main again with the same --attempt, then evaluation.promote")
    registry.client.set_model_version_tag(registry.name, version, "gate_reason", decision.reason[:1000])
    if decision.passed and champion != version:
        if champion is not None:
            registry.client.set_registered_model_alias(registry.name, PREVIOUS_CHAMPION, champion)
        registry.client.set_registered_model_alias(registry.name, CHAMPION, version)
    registry.client.set_model_version_tag(registry.name, version, "validation_status", "passed" if decision.passed else "failed")


def mechanical_gate(store: TableStore, dt: str, run_dir: Path, primary: str, package: Path, model_uri: str, tracking_uri: str) -> Decision:
    """Load the registered artifact in a fresh process, with its own code, and compare its scores with the evaluation's."""
    items = store.read(store.require("items", dt))
    sequences = Sequences.from_arrow(store.read(store.require("sequences", dt)))
    evaluated = pq.read_table(run_dir / "scores.parquet", columns=["user_id", primary])
    user_ids, first, count = np.unique(evaluated["user_id"].to_numpy(), return_index=True, return_counts=True)
    # Spread over the users, the one with the most targets among them.
    chosen = np.unique(np.append(np.linspace(0, len(user_ids) - 1, min(USERS_CHECKED, len(user_ids))).astype(int), count.argmax()))
    rows = {int(user): row for row, user in enumerate(sequences.user_id)}
    requests = [request_of(items, sequences, rows[int(user_ids[user])]) for user in chosen]
    column = evaluated[primary].to_numpy()
    expected = [column[first[user] : first[user] + len(request["target_item_id"])] for user, request in zip(chosen, requests, strict=True)]
    scorer = load_scorer(package)
    expected.append(scorer.score_request(scorer.example_request()))
    try:
        fresh = _score_in_fresh_process(model_uri, requests, tracking_uri)
    except (subprocess.SubprocessError, OSError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return Decision(False, f"the artifact does not run in a fresh process: {detail[-1] if detail else error}")
    if not fresh["own_code"]:
        return Decision(False, "the artifact runs code from elsewhere instead of its own")
    if fresh["pickles"]:
        return Decision(False, f"the artifact holds pickles: {', '.join(fresh['pickles'])}")
    got = [*fresh["requests"], fresh["example"]]
    worst = max((float(np.abs(np.asarray(a) - b).max()) if len(a) == len(b) else np.inf for a, b in zip(got, expected, strict=True)), default=np.inf)
    scores = sum(map(len, expected))
    if not worst <= SCORE_TOLERANCE:
        return Decision(False, f"the artifact in a fresh process differs by {worst:.2g} from the evaluation in {scores} scores")
    return Decision(True, f"artifact in a fresh process gives the same {scores} scores within {worst:.1g}")


def _score_in_fresh_process(model_uri: str, requests: list[dict], tracking_uri: str) -> dict:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MLFLOW_RUN_ID")}
    with tempfile.TemporaryDirectory() as folder:
        requests_file, scores_file = Path(folder) / "requests.json", Path(folder) / "scores.json"
        requests_file.write_text(json.dumps(request_frame(requests).to_dict("list")))
        script = Path(__file__).with_name("fresh_scores.py")
        subprocess.run([sys.executable, "-P", str(script), model_uri, str(requests_file), str(scores_file)], cwd=folder, check=True,
                       env=env | {"MLFLOW_TRACKING_URI": tracking_uri}, capture_output=True, text=True, timeout=FRESH_PROCESS_SECONDS)
        return json.loads(scores_file.read_text())


if __name__ == "__main__":
    run_stage(main)
