"""Groups of evaluation targets: every target is in one of each kind, and its figures are those of its targets alone."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from etl.stage.folder import Folder
from etl.warehouse.partitions import MS_PER_DAY
from evaluation.day_scores import SCORES_FILE, DayScores
from evaluation.evaluate import Scored
from evaluation.groups import groupings, metrics_of_groups
from evaluation.metrics import auc, gauc, logloss
from evaluation.report import _groups

HOUR_MS = MS_PER_DAY // 24
SEEN = [0, 3, 4, 5, 900]  # occurrences of each item in training


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    """Three users with 2, 4 and 6 targets."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("day")
    score = rng.random(12).astype(np.float32)
    rows = pa.table(
        {
            "user_id": np.repeat([11, 12, 13], (2, 4, 6)),
            "time_ms": 5 * MS_PER_DAY + np.arange(12) * 2 * HOUR_MS,
            "label": rng.integers(0, 2, 12).astype(np.int8),
            "history_length": np.arange(12, dtype=np.int32),
            "is_random": np.zeros(12, bool),
            "item_id": rng.integers(0, 5, 12),
            "context": rng.integers(-1, 12, 12).astype(np.int16),
        }
    )
    rows = rows.append_column("train_occurrences", pa.array(np.array(SEEN)[rows["item_id"].to_numpy()]))
    rows = rows.append_column("vql", pa.array(score)).append_column("<other>", pa.array(1 - score))
    pq.write_table(rows, folder / SCORES_FILE, row_group_size=5)
    file = DayScores(Folder(str(folder), "--runs"))
    scored = Scored.read(file)
    return rows, scored, list(groupings(file, scored.user, rare_below=5))


def test_every_target_is_in_the_group_that_its_user_item_hour_and_context_say(day):
    rows, _, found = day
    by = {grouping.by: [grouping.names[number] for number in grouping.group_T] for grouping in found}
    assert list(by) == ["activity", "item", "hour", "context"]
    assert by["activity"] == [f"{n} targets of the user" for n in np.repeat(["2 to 4", "6 to 6"], 6)]
    names = ["new: not in training", *["rare: 1 to 4 times in training"] * 2, *["5 times or more in training"] * 2]
    assert by["item"] == [names[item] for item in rows["item_id"].to_pylist()]
    assert by["hour"] == [f"{h:02d} to {h + 6:02d} h UTC" for h in np.repeat([0, 6, 12, 18], 3)]
    context = rows["context"].to_numpy()
    values, counts = np.unique(context, return_counts=True)
    for value, name in zip(context, by["context"], strict=True):
        own = "no context" if value < 0 else f"context {value}"
        assert name == own or (name == "other contexts" and counts[values == value] <= np.sort(counts)[-8])


def test_the_figures_of_a_group_are_those_of_its_targets_and_stand_on_the_page(day):
    _, scored, found = day
    for grouping in found:
        parts = metrics_of_groups(scored.user, scored.label, scored.scores, grouping)
        assert sum(part["targets"] for part in parts) == 12
        page = _groups({"groups": parts})
        for part in parts:
            rows = grouping.group_T == grouping.names.index(part["group"])
            assert part["users"] == len(np.unique(scored.user[rows]))
            for name, score in scored.scores.items():
                of = part["models"][name]
                assert of["logloss"] == logloss(scored.label[rows], score[rows])
                np.testing.assert_equal(of["auc"], auc(scored.label[rows], score[rows]))
                np.testing.assert_equal(of["gauc"], gauc(scored.user[rows], scored.label[rows], score[rows])[0])
            assert f"{part['group']}, {part['targets']} targets of {part['users']} users" in page
        assert f"<h2>By {grouping.by}</h2>" in page and "&lt;other&gt;" in page
    assert _groups({}) == "", "an evaluation of before has no groups"
