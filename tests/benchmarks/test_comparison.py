"""The comparison of all kinds on several data sets: every set can be built, and what was trained is shown."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from benchmarks.comparison import SETS, SWEPT
from benchmarks.comparison_page import write_page
from etl.datasets.definition import dataset
from evaluation.trials import RESAMPLES, RESULTS_FILE
from tests.evaluation.test_compare import exposed, line
from training.model.interests import INTERESTS


@pytest.mark.parametrize("data_set", SETS, ids=lambda data_set: data_set.name)
def test_a_set_has_a_definition_of_its_name_and_lengths_that_a_target_can_see(data_set):
    definition = dataset(data_set.definition)
    assert definition.name == data_set.name
    assert max(*data_set.lengths, data_set.longest or 0) <= definition.history.max_events
    assert set(SWEPT.split(",")) <= INTERESTS.keys()


def test_the_page_has_a_table_a_set_and_plots_of_what_was_trained(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.01, RESAMPLES)
    aucs = {"din": 0.70, "vql": 0.72, "eta": 0.71}
    lines = [line(model, seed, auc + seed / 1_000, noise) for model, auc in aucs.items() for seed in (1, 2)]
    lines += [line("vql", 1, 0.65, noise) | {"length": 3}]
    both = [one | {"dataset": name} for name in ("two", "one") for one in lines]
    both.append(exposed("vql", 3, 0.72, 0.61, noise) | {"dataset": "two"})
    (tmp_path / RESULTS_FILE).write_text("\n".join(map(json.dumps, both)) + "\n")
    text = write_page(tmp_path, ["one", "two", "not trained"], tmp_path / "out").read_text()
    heads = ["## one", "### one by length", "## two", "### two by length"]
    assert [row for row in text.splitlines() if row.startswith("#")] == heads
    of_two = text.split("## two")[1]
    assert "AUC, random" in of_two and "| vql | 1 | 0.7200 |" in of_two and "AUC, random" not in text.split("## two")[0]
    rows = [row.split(" | ") for row in text.split("## two")[0].splitlines() if re.match(r"\| \w+ \| [39] \|", row)]
    # The best first, at the longest length alone; then those of several lengths, the shortest first.
    models = [(row[0], row[1]) for row in rows]
    assert models == [("| vql", "9"), ("| eta", "9"), ("| din", "9"), ("| vql", "3"), ("| vql", "9")]
    assert [row[6] for row in rows[:3]] == ["-", "-0.0100", "-0.0200"]  # minus vql, whatever was trained first
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {entry["length"] for entry in summary["one"]} == {3, 9}
    assert all((tmp_path / "out" / name).stat().st_size > 1_000 for name in ("difference.png", "length.png"))
    (tmp_path / RESULTS_FILE).write_text("\n".join(json.dumps(one) for one in both if one["length"] == 9) + "\n")
    assert "by length" not in write_page(tmp_path, ["one"], tmp_path / "out").read_text()
