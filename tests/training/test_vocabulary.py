"""Rows of ids, categories, numbers and contexts: what they mean, and that a later partition never moves them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.conftest import KUAIRAND_ITEMS, random_partition, vocabulary_of
from training.config import VocabularyConfig
from training.data import Sequences
from training.vocabulary import MAX_CATEGORIES, NUMBER_BUCKETS, IdField, NumberField, ValueField, Vocabulary

CONFIG = VocabularyConfig(min_occurrences=5, hashed_rows=8)


def items_of(*rows: dict) -> pa.Table:
    """Items with the fields of KuaiRand; a field that is not given is missing."""
    missing = {"author_id": None, "categories": [], "duration_ms": None, "item_type": None, "upload_type": None}
    table = [{"item_index": index, "train_occurrences": 9, **missing, **row} for index, row in enumerate(rows)]
    return pa.Table.from_pylist(table, schema=KUAIRAND_ITEMS)


def build(items: pa.Table, users=(("x", "y"),), contexts=(0, 1), config: VocabularyConfig = CONFIG) -> Vocabulary:
    return Vocabulary.build(items, [np.array(values, dtype=object) for values in users], np.array(contexts), config)


def user_columns(users) -> list[np.ndarray]:
    return [np.array(values, dtype=object) for values in users]


def meanings(vocabulary: Vocabulary) -> dict[tuple[str, object], int]:
    """(field, value) -> row of everything that has a row of its own."""
    found: dict[tuple[str, object], int] = {}
    for name, field in vocabulary.items.items():
        if isinstance(field, IdField):
            found |= {(name, int(i)): int(row) for i, row in zip(field.ids, field.row_of(field.ids), strict=True)}
        elif isinstance(field, ValueField):
            rows = field.row_of(pa.array(field.values, pa.string()))
            found |= {(name, value): int(row) for value, row in zip(field.values, rows, strict=True)}
        else:
            found[name, "edges"] = hash(field.edges)
    for column, field in enumerate(vocabulary.user_fields):
        found |= {(f"user {column}", value): 1 + row for row, value in enumerate(field.values)}
    rows = vocabulary.context_rows(np.array(vocabulary.contexts))
    return found | {("context", value): int(row) for value, row in zip(vocabulary.contexts, rows, strict=True)}


# ---- one vocabulary --------------------------------------------------------------------------------------------------


def test_the_kind_of_a_field_is_its_arrow_type_and_the_item_comes_first():
    vocabulary = build(items_of({"item_id": 3}))
    kinds = {name: field.kind for name, field in vocabulary.items.items()}
    assert next(iter(kinds)) == "item_id"
    assert kinds == {
        "item_id": "id",
        "author_id": "id",
        "categories": "categories",
        "duration_ms": "number",
        "item_type": "category",
        "upload_type": "category",
    }


def test_rare_and_new_ids_share_hashed_rows_and_frequent_ones_have_their_own():
    items = items_of(*({"item_id": 10 * n, "train_occurrences": n} for n in range(1, 60)))
    vocabulary = build(items)
    rows = vocabulary.item_features(items).rows["item_id"]
    frequent = items["train_occurrences"].to_numpy() >= 5
    assert sorted(rows[frequent]) == list(range(9, 9 + frequent.sum()))
    assert ((rows[~frequent] >= 1) & (rows[~frequent] <= 8)).all()
    new = vocabulary.item_ids.row_of(np.arange(1, 5_000, 10))
    assert set(new) == set(range(1, 9))  # all shared rows are in use
    assert vocabulary.item_ids.is_hashed(new).all()
    assert not vocabulary.item_ids.is_hashed(np.array([0, 9, vocabulary.item_ids.rows - 1])).any()
    assert vocabulary.item_ids.rows == 9 + frequent.sum()


def test_an_author_is_as_frequent_as_his_items_together():
    rows = [{"item_id": n, "author_id": n % 3, "train_occurrences": 2 if n % 3 else 1} for n in range(9)]
    vocabulary = build(items_of(*rows))
    field = vocabulary.items["author_id"]
    assert isinstance(field, IdField)
    assert field.ids.tolist() == [1, 2]  # author 0 was met three times, the others six


def test_hashed_ids_of_63_bits_and_negative_ones_have_rows():
    ids = np.array([-1, -(2**62), 2**63 - 1, 0, 5])
    rows = IdField.of(np.array([5]), 8).row_of(ids)
    assert rows[-1] == 9
    assert ((rows[:-1] >= 1) & (rows[:-1] <= 8)).all()


def test_missing_and_unseen_values_have_row_0():
    known = items_of(
        {
            "item_id": 1,
            "author_id": 7,
            "categories": ["a", "b"],
            "duration_ms": 10.0,
            "item_type": "N",
            "upload_type": "",
        },
        {"item_id": 2},
    )
    vocabulary = build(known)
    rows = vocabulary.item_features(
        items_of({"item_id": 1, "categories": ["new", "b"], "item_type": "new"}, {"item_id": 2, "item_type": "N"})
    ).rows
    assert rows["author_id"].tolist() == [0, 0]
    assert rows["duration_ms"].tolist() == [0, 0]
    assert rows["item_type"].tolist() == [0, 1]
    assert rows["upload_type"].tolist() == [0, 0]
    assert rows["categories"][0, :3].tolist() == [0, 2, 0]
    assert vocabulary.items["upload_type"].rows == 1  # an empty text is no value
    assert vocabulary.user_rows([["x"], ["y"], [""], ["new"]]).tolist() == [[1], [2], [0], [0]]
    assert vocabulary.context_rows(np.array([0, 1, -1, 99])).tolist() == [1, 2, 0, 0]


def test_an_item_that_the_model_never_saw_has_only_its_hashed_row():
    vocabulary = build(
        items_of({"item_id": 1, "author_id": 7, "categories": ["a"], "duration_ms": 10.0, "item_type": "N"})
    )
    for ids in ([1, 99], [99], [99, 1, 1]):
        rows = vocabulary.item_features(vocabulary.item_table_of(np.array(ids))).rows
        for place, item in enumerate(ids):
            assert rows["author_id"][place] == (9 if item == 1 else 0)
            assert rows["categories"][place, 0] == (1 if item == 1 else 0)
            assert (rows["duration_ms"][place] > 0) == (item == 1)
            assert (rows["item_id"][place] > 8) == (item == 1)


def test_a_vocabulary_of_nothing_still_joins():
    vocabulary = build(items_of(), users=(), contexts=())
    table = vocabulary.item_table_of(np.array([4, 5]))
    rows = vocabulary.item_features(table).rows
    assert (rows["item_id"] >= 1).all()
    assert all((rows[name] == 0).all() for name in rows if name != "item_id")
    assert vocabulary.context_rows(np.array([0, 3])).tolist() == [0, 0]
    assert vocabulary.user_rows([[], []]).shape == (2, 0)


def test_lists_keep_their_first_categories_and_slices_are_read_at_their_place():
    names = [f"c{n}" for n in range(MAX_CATEGORIES + 3)]
    items = items_of({"item_id": 1, "categories": ["c0"]}, {"item_id": 2, "categories": names}, {"item_id": 3})
    vocabulary = build(items)
    rows = vocabulary.item_features(items).rows["categories"]
    assert rows.tolist() == [[1, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0] * 6]
    assert vocabulary.item_features(items.slice(1)).rows["categories"].tolist() == rows[1:].tolist()
    twice = pa.concat_tables([items.slice(2), items.slice(0, 2)])  # several chunks
    assert vocabulary.item_features(twice).rows["categories"].tolist() == rows[[2, 0, 1]].tolist()


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_numbers_are_bucketed_by_their_quantiles():
    values = np.random.default_rng(0).permutation(np.arange(1_600.0))
    vocabulary = build(items_of(*({"item_id": n, "duration_ms": float(v)} for n, v in enumerate(values))))
    field = vocabulary.items["duration_ms"]
    assert isinstance(field, NumberField)
    rows = field.row_of(pa.array(values))
    assert field.rows == 1 + NUMBER_BUCKETS
    assert np.bincount(rows, minlength=field.rows).tolist() == [0, *[100] * NUMBER_BUCKETS]
    assert (np.diff(rows[np.argsort(values)]) >= 0).all()
    far = field.row_of(pa.array([-1e9, 1e9, None, float("nan")]))
    assert far.tolist() == [1, NUMBER_BUCKETS, 0, 0]


def test_numbers_that_are_all_alike_or_not_there_have_rows():
    alike = build(items_of(*({"item_id": n, "duration_ms": 7.0} for n in range(5)))).items["duration_ms"]
    assert set(alike.row_of(pa.array([6.0, 7.0, 8.0, None]))) == {0, 1, 2}
    assert alike.rows == 3
    none = build(items_of(*({"item_id": n} for n in range(5)))).items["duration_ms"]
    assert none.row_of(pa.array([6.0, None])).tolist() == [1, 0]
    assert none.rows == 2


def test_a_number_that_is_none_leaves_the_others_their_buckets():
    rows = [{"item_id": n, "duration_ms": float(n)} for n in range(160)]
    clean = build(items_of(*rows)).items["duration_ms"]
    assert build(items_of(*rows, {"item_id": 160, "duration_ms": float("nan")})).items["duration_ms"] == clean


# ---- a later partition -----------------------------------------------------------------------------------------------


def test_a_later_partition_moves_no_row_and_its_ids_get_rows_behind():
    first = items_of(
        {"item_id": 10, "author_id": 5, "categories": ["m"], "item_type": "N", "duration_ms": 4.0},
        {"item_id": 30, "author_id": 3, "categories": ["k"], "item_type": "A", "duration_ms": 8.0},
        {"item_id": 40, "train_occurrences": 1},
    )
    second = items_of(
        {"item_id": 20, "author_id": 4, "categories": ["a", "m"], "item_type": "B", "duration_ms": 99.0},
        {"item_id": 30, "author_id": 3, "categories": ["l"], "train_occurrences": 1},
        {"item_id": 40, "train_occurrences": 7},
        {"item_id": 50, "train_occurrences": 1},
    )
    old = build(first, users=(["x", "m"],), contexts=[4, 9])
    new = old.appended(second, user_columns([["a", "x", "n"]]), np.array([7, 4, -1]), CONFIG)
    before, after = meanings(old), meanings(new)
    assert before.items() <= after.items()
    assert {name: after[name] for name in after.keys() - before.keys()} == {
        ("item_id", 20): 11,
        ("item_id", 40): 12,
        ("author_id", 4): 11,
        ("categories", "a"): 3,
        ("categories", "l"): 4,
        ("item_type", "B"): 3,
        ("user 0", "a"): 3,
        ("user 0", "n"): 4,
        ("context", -1): 3,
        ("context", 7): 4,
    }
    assert new.item_ids.is_hashed(new.item_ids.row_of(np.array([50]))).all()
    assert new.user_rows([["x"], ["a"]]).tolist() == [old.user_rows([["x"]])[0].tolist(), [3]]
    # Numbers keep their buckets, and what is known of an item is the latest.
    assert new.items["duration_ms"] == old.items["duration_ms"]
    table = new.item_table_of(np.array([10, 20, 30, 60])).to_pylist()
    assert [row["categories"] for row in table] == [["m"], ["a", "m"], ["l"], []]
    assert new.known_items["item_id"].to_pylist() == [10, 20, 30, 40, 50]


def test_the_same_partition_again_changes_nothing(partition):
    items, rows = partition
    sequences = Sequences.from_arrow(rows)
    vocabulary = vocabulary_of(items, sequences)
    fields = user_columns(zip(*sequences.user_fields, strict=True))
    again = vocabulary.appended(
        items, fields, sequences.target_context[sequences.target_split == 0], VocabularyConfig()
    )
    assert meanings(again) == meanings(vocabulary)
    assert again.known_items.equals(vocabulary.known_items)


partitions = st.lists(
    st.builds(
        lambda ids, values, contexts: (sorted(ids), values, contexts),
        st.sets(st.integers(0, 30), min_size=1, max_size=12),
        st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=4),
        st.lists(st.integers(-1, 12), max_size=4),
    ),
    min_size=2,
    max_size=4,
)


@settings(max_examples=100)
@given(partitions, st.data())
def test_no_chain_of_partitions_moves_a_row(days, data):
    vocabulary: Vocabulary | None = None
    for ids, values, contexts in days:
        rows = [
            {
                "item_id": i,
                "author_id": i % 7,
                "categories": values,
                "item_type": values[0],
                "duration_ms": float(i),
                "train_occurrences": data.draw(st.integers(0, 9)),
            }
            for i in ids
        ]
        arguments = items_of(*rows), user_columns([values]), np.array(contexts, dtype=np.int16), CONFIG
        later = Vocabulary.build(*arguments) if vocabulary is None else vocabulary.appended(*arguments)
        found = meanings(later)
        if vocabulary is not None:
            assert meanings(vocabulary).items() <= found.items()
        # No two values of a field share a row, and every row is within the table.
        for name, field in later.items.items():
            if not isinstance(field, NumberField):
                own = [row for (where, _), row in found.items() if where == name]
                assert len(set(own)) == len(own)
                assert all(row < field.rows for row in own)
        contexts_now = [row for (where, _), row in found.items() if where == "context"]
        assert sorted(contexts_now) == list(range(1, 1 + len(later.contexts)))
        vocabulary = later


# ---- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("appended", [False, True])
def test_a_vocabulary_comes_back_from_disk_as_it_was(appended, tmp_path):
    items, rows = random_partition()
    sequences = Sequences.from_arrow(rows)
    vocabulary = vocabulary_of(items, sequences)
    if appended:
        later, later_rows = random_partition(items=55, seed=3)
        later_sequences = Sequences.from_arrow(later_rows)
        fields = user_columns(zip(*later_sequences.user_fields, strict=True))
        vocabulary = vocabulary.appended(later, fields, later_sequences.target_context, VocabularyConfig())
    vocabulary.save(tmp_path)
    again = Vocabulary.load(tmp_path)
    assert meanings(again) == meanings(vocabulary)
    assert list(again.items) == list(vocabulary.items)
    assert again.known_items.equals(vocabulary.known_items)
    for name, expected in vocabulary.item_features(items).rows.items():
        assert np.array_equal(again.item_features(items).rows[name], expected)
    asked = np.array([1000, 1007, 5])
    assert again.item_table_of(asked).equals(vocabulary.item_table_of(asked))
    # What came back from disk is what a warm start appends to.
    fields = user_columns(zip(*sequences.user_fields, strict=True))
    warm = again.appended(items, fields, sequences.target_context, VocabularyConfig())
    assert meanings(vocabulary).items() <= meanings(warm).items()


def test_ids_of_63_bits_survive_the_disk(tmp_path):
    ids = [1, 2**62 + 1, 2**63 - 1]
    build(items_of(*({"item_id": i} for i in ids))).save(tmp_path)
    assert Vocabulary.load(tmp_path).item_ids.ids.tolist() == ids
