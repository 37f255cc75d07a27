"""A warm start.

Every known item keeps its row and its scores, new ones get rows behind, and a model of the future is refused.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch

import training.job
import training.train
from etl.stage.errors import StageError
from etl.stage.folder import Folder
from etl.warehouse.schemas import EVALUATION
from tests.training.conftest import random_partition
from training.config import ModelConfig, VocabularyConfig
from training.data import Joined, Sequences, make_batch
from training.model.ranker import FieldSizes, Ranker
from training.package import Cutoff, inherit, load_package, save_package
from training.train import begun_from
from training.vocabulary import Vocabulary

CONFIG = ModelConfig(codes=8, heads=2, groups=2, head_width=8, mlp=(16,))


def fields_of(sequences: Sequences) -> list[np.ndarray]:
    return [np.array(values, dtype=object) for values in zip(*sequences.user_fields, strict=True)]


def scores(model: Ranker, vocabulary: Vocabulary, items: pa.Table, rows: pa.Table) -> np.ndarray:
    sequences = Sequences.from_arrow(rows)
    users = np.arange(sequences.users)
    targets = [np.arange(*sequences.targets_of(user).indices(len(sequences.target_item))) for user in users]
    with torch.no_grad():
        return model.eval()(make_batch(Joined.of(sequences, items, vocabulary), users, targets).to("cpu"))[0].numpy()


def test_what_was_known_scores_as_before_and_new_items_have_rows_of_their_own(tmp_path):
    items, rows = random_partition(users=6, items=40)
    sequences = Sequences.from_arrow(rows)
    config = VocabularyConfig(min_occurrences=2, hashed_rows=4)
    vocabulary = Vocabulary.build(items, fields_of(sequences), sequences.target_context, config)
    older = Ranker(FieldSizes.of(vocabulary), CONFIG)
    older.coded.quantizer.started.fill_(True)
    save_package(tmp_path, older, vocabulary, Cutoff(), {})
    older, known, _ = load_package(tmp_path)

    later_items, _ = random_partition(users=6, items=70, seed=3)
    grown = known.appended(later_items, fields_of(sequences), np.array([14, 15]), config)
    model = Ranker(FieldSizes.of(grown), CONFIG)
    inherit(model, grown, older, known)
    assert np.allclose(scores(model, grown, items, rows), scores(older, known, items, rows), atol=1e-6)
    later = later_items, random_partition(users=6, items=70, seed=3)[1]
    assert np.allclose(scores(model, grown, *later), scores(older, known, *later), atol=1e-6)
    before, after = known.item_ids, grown.item_ids
    assert after.rows > before.rows
    assert (after.row_of(before.ids) == before.row).all()
    new = np.setdiff1d(after.ids, before.ids)
    assert (after.row_of(new) >= before.rows).all()
    assert len(np.unique(after.row_of(after.ids))) == len(after.ids)
    assert model.state_dict().keys() == older.state_dict().keys()


def test_another_configuration_does_not_fit(tmp_path):
    items, rows = random_partition()
    sequences = Sequences.from_arrow(rows)
    vocabulary = Vocabulary.build(items, fields_of(sequences), sequences.target_context, VocabularyConfig())
    older = Ranker(FieldSizes.of(vocabulary), CONFIG)
    with pytest.raises(StageError, match=r"a warm start does not fit: .* is .*, in the older model"):
        inherit(Ranker(FieldSizes.of(vocabulary), dataclasses.replace(CONFIG, codes=16)), vocabulary, older, vocabulary)


@pytest.mark.parametrize(
    ("partition", "warm"), [("2022-04-20", True), ("2022-04-21", False), ("2022-04-25", False), (None, False)]
)
def test_only_a_champion_of_an_earlier_day_is_started_from(monkeypatch, partition, warm):
    version = SimpleNamespace(tags={"pipeline.partition": partition})
    registry = SimpleNamespace(
        aliases=lambda: {"champion": "3"} if partition else {},
        version=lambda v: version,
    )
    monkeypatch.setattr(training.job, "Registry", lambda dataset: registry)
    assert training.job.champion_before("kuairand", "2022-04-21") == ("3" if warm else None)
    assert EVALUATION == 2


@pytest.mark.parametrize("champions", [("3", "4"), (None, "4")])
def test_a_retry_begins_with_what_the_first_try_began_with_whatever_is_champion_by_then(
    monkeypatch, tmp_path, champions
):
    """Else its checkpoints would be refused: they are of a training with another warm start."""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "model.safetensors").write_bytes(b"weights")
    registry = SimpleNamespace(package=lambda version: tmp_path / "package")
    monkeypatch.setattr(training.train, "Registry", lambda dataset: registry)
    found = []
    for champion in champions:
        monkeypatch.setattr(training.train, "champion_before", lambda dataset, dt, now=champion: now)
        found.append(begun_from("champion", "kuairand", "2022-04-21", Folder(str(tmp_path / "run"), "--runs")))
    address, name = found[0]
    assert found[1] == found[0] and name == (champions[0] or "none")
    if champions[0]:
        assert Path(address, "model.safetensors").read_bytes() == b"weights"
    else:
        assert address is None
