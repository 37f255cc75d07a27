"""The page of an evaluation is whole in itself, and says what it knows and what it does not."""

from __future__ import annotations

import dataclasses
import re
import xml.dom.minidom
from typing import Any

import numpy as np
import pytest

from evaluation.evaluate import Scored, compare
from evaluation.log_evaluation import figures_of_attempt, table
from evaluation.metrics import auc
from evaluation.report import report_page

TAGS = {"pipeline.partition": "2022-04-21", "airflow.run_url": "javascript:alert(1)", "pipeline.command": "<b>python"}


@pytest.fixture(scope="module")
def scored() -> Scored:
    rng = np.random.default_rng(0)
    user, label = np.repeat(np.arange(40), 10), rng.integers(0, 2, 400)
    scores = {name: np.clip(0.5 + w * (label - 0.5) + rng.normal(0, 0.2, 400), 0.01, 0.99) for name, w in WEIGHTS}
    return Scored(user, label, user + 1, RANDOM, scores)


@pytest.fixture(scope="module")
def evaluation(scored) -> dict[str, Any]:
    served = {"champion": {"version": "3", "partition": "2022-04-20", "attempt": "a", "warning": None}}
    found = compare(scored, "vql", served)
    return {"dt": "2022-04-21", "dataset": "own", "simulated": True, "best_auc": 0.9, "primary": "vql", **found}


RANDOM = np.arange(400) % 4 == 0
WEIGHTS = (("vql", 0.3), ("mean_pooling", 0.1), ("champion", 0.2))


def test_the_page_has_every_model_interval_slice_and_drawing_and_needs_nothing_beside_it(evaluation):
    probe = {"probe_1_to_99_events/attention_error": 0.1069, "probe_1_to_99_events/bound": 0.5, "train_loss": 0.7}
    page = report_page(evaluation, probe, TAGS | {"promotion": "refused", "gate_reason": "log loss & <more>"})
    assert "<b>refused</b>log loss &amp; &lt;more&gt;" in page and "SIMULATED data" in page
    for row in (*evaluation["models"], evaluation["champion"]):
        assert f"{row['auc']:.4f}" in page and f"{row['auc_low']:.4f} to {row['auc_high']:.4f}" in page
    assert "vql minus champion" in page
    assert page.count(" events, ") == len(evaluation["slices"]) * 3
    assert "0.1069" in page and "train_loss" not in page
    for part, targets in zip(evaluation["exposures"], (100, 300), strict=True):
        assert f"{part['exposure']}, {targets} targets of 40 users" in page
        assert all(f"{of['auc_low']:.4f} to {of['auc_high']:.4f}" in page for of in part["models"].values())
    drawings = re.findall("<svg.*?</svg>", page)
    assert len(drawings) == 2
    for drawing in drawings:
        xml.dom.minidom.parseString(drawing)
    assert drawings[1].count("<polyline") == 3
    assert "<script" not in page and "src=" not in page and "href" not in page and "&lt;b&gt;python" in page


def test_every_model_is_one_line_over_the_partitions(evaluation):
    days = {
        f"2022-04-{day:02d}": (0.5 + day / 100, 0.49 + day / 100, None if day == 3 else 0.52) for day in range(1, 11)
    }
    gone = {day: of for day, of in days.items() if day != "2022-04-05"}
    page = report_page(evaluation, {}, TAGS, {"vql": days, "<b>": gone})
    section = page[page.index("Over the partitions") : page.index("Where it came from")]
    [drawing] = re.findall("<svg.*?</svg>", section)
    xml.dom.minidom.parseString(drawing)
    assert [len(places.split()) for places in re.findall('points="(.*?)"', drawing)] == [10, 9]
    assert drawing.count("<line") == 8 + 9  # a bound is unknown: no interval is drawn
    assert "0.5300 (0.5200 to -)" in section and "<b>" not in section and section.count("<tr>") == 11
    assert section.index("2022-04-10") < section.index("2022-04-09")  # the newest is on top
    assert "Over the partitions" not in report_page(evaluation, {}, TAGS, {"vql": {"2022-04-01": (0.5, None, None)}})


def test_what_chance_showed_is_measured_beside_what_a_recommender_did(scored):
    found = compare(scored, "vql", {})
    random, standard = found["exposures"]
    assert (random["exposure"], standard["exposure"]) == ("random", "standard")
    assert random["targets"] + standard["targets"] == found["models"][0]["targets"] == 400
    for part, rows in ((random, RANDOM), (standard, ~RANDOM)):
        for name, of in part["models"].items():
            assert of["auc"] == pytest.approx(auc(scored.label[rows], scored.scores[name][rows]))
            assert of["auc_low"] < of["auc"] < of["auc_high"]
        assert part["paired"]["vql_minus_champion"]["value"] == pytest.approx(
            part["models"]["vql"]["auc"] - part["models"]["champion"]["auc"]
        )
    evaluated = {"simulated": True, "dt": "2022-04-21", "dataset": "own", "best_auc": None, "primary": "vql", **found}
    assert f"100 targets of 40 users by random exposure: {random['models']['vql']['auc']:.4f}" in table(evaluated)
    assert figures_of_attempt(evaluated)["random_exposure/auc"] == random["models"]["vql"]["auc"]


def test_without_random_traffic_nothing_is_said_of_exposures(scored):
    found = compare(dataclasses.replace(scored, is_random=np.zeros(400, bool)), "vql", {})
    assert found["exposures"] == []
    whole = {"simulated": True, "dt": "2022-04-21", "dataset": "own", "best_auc": None, "primary": "vql", **found}
    assert "exposure" not in table(whole) and "exposed" not in report_page(whole, {}, {})


def test_what_is_not_known_is_no_error(evaluation):
    rows = [row | {"auc_low": None, "auc_high": None} for row in evaluation["models"]]
    warned = {"version": "9", "warning": "it is gone"}
    page = report_page(evaluation | {"models": rows, "champion": warned, "best_auc": None, "slices": []}, {}, {})
    assert "not decided" in page and "champion version 9 is not compared: it is gone" in page
    assert "- to -" in page and "Attention error" not in page
