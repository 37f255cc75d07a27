"""Groups of evaluation targets: every target is in one of each kind, and its figures are those of its targets alone."""

import numpy as np
import pyarrow as pa
import pytest

from etl.warehouse.partitions import MS_PER_DAY
from etl.warehouse.schemas import EVALUATION, TRAIN
from evaluation.groups import groupings, metrics_of_groups
from evaluation.metrics import auc, logloss
from evaluation.report import _groups
from training.scoring import ScoredTargets

HOUR_MS = MS_PER_DAY // 24
SEEN = [0, 3, 4, 5, 900]  # occurrences of each item in training


@pytest.fixture(scope="module")
def day():
    """Three users with 2, 4 and 6 evaluation targets, each behind one of training, which no group may count."""
    rng = np.random.default_rng(0)
    counts = (2, 4, 6)
    lists = {name: [] for name in ("target_split", "target_item_index", "target_context")}
    for count in counts:
        lists["target_split"].append([TRAIN] + [EVALUATION] * count)
        lists["target_item_index"].append([4, *rng.integers(0, 5, count).tolist()])
        lists["target_context"].append([77, *rng.integers(-1, 12, count).tolist()])
    sequences = pa.table(lists)
    items = pa.table({"train_occurrences": SEEN})
    user = np.repeat([11, 12, 13], counts)
    time_ms = 5 * MS_PER_DAY + np.arange(12) * 2 * HOUR_MS
    label, score = rng.integers(0, 2, 12), rng.random(12).astype(np.float32)
    targets = ScoredTargets(user, user, time_ms, label, score, user)
    return targets, list(groupings(items, sequences, targets, rare_below=5)), sequences


def judged(sequences: pa.Table, name: str) -> np.ndarray:
    split = np.concatenate(sequences["target_split"].to_pylist())
    return np.concatenate(sequences[name].to_pylist())[split == EVALUATION]


def test_every_target_is_in_the_group_that_its_user_item_hour_and_context_say(day):
    _, found, sequences = day
    by = {grouping.by: [grouping.names[number] for number in grouping.group_T] for grouping in found}
    assert list(by) == ["activity", "item", "hour", "context"]
    assert by["activity"] == [f"{n} targets of the user" for n in np.repeat(["2 to 4", "6 to 6"], 6)]
    names = ["new: not in training", *["rare: 1 to 4 times in training"] * 2, *["5 times or more in training"] * 2]
    assert by["item"] == [names[item] for item in judged(sequences, "target_item_index")]
    assert by["hour"] == [f"{h:02d} to {h + 6:02d} h UTC" for h in np.repeat([0, 6, 12, 18], 3)]
    values, counts = np.unique(judged(sequences, "target_context"), return_counts=True)
    for value, name in zip(judged(sequences, "target_context"), by["context"], strict=True):
        own = "no context" if value < 0 else f"context {value}"
        assert name == own or (name == "other contexts" and counts[values == value] <= np.sort(counts)[-8])


def test_the_figures_of_a_group_are_those_of_its_targets_and_stand_on_the_page(day):
    targets, found, _ = day
    scores = {"vql": targets.score, "<other>": 1 - targets.score}
    for grouping in found:
        parts = metrics_of_groups(targets, scores, grouping)
        assert sum(part["targets"] for part in parts) == 12
        page = _groups({"groups": parts})
        for part in parts:
            rows = grouping.group_T == grouping.names.index(part["group"])
            for name, score in scores.items():
                of = part["models"][name]
                assert of["logloss"] == logloss(targets.label[rows], score[rows])
                np.testing.assert_equal(of["auc"], auc(targets.label[rows], score[rows]))
            assert f"{part['group']}, {part['targets']} targets of {part['users']} users" in page
        assert f"<h2>By {grouping.by}</h2>" in page and "&lt;other&gt;" in page
    assert _groups({}) == "", "an evaluation of before has no groups"
