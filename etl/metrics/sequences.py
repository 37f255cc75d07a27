"""The metrics of a partition's items (`measure.items.ItemsFacts`) and sequences (`measure.sequences.SequencesFacts`).

What `count` says is measured of each bucket of users (`measure.sequences.UserLists`), by the job's tasks or by the
gate, and added up; `measure` then reads the sums as `facts.counted`.
"""

from __future__ import annotations

from etl.metrics import panels
from etl.metrics.events import FIELD_PSI, LABEL_RATE_RATIO, NEW_CATEGORY_SHARE, REBUILD
from etl.metrics.record import (
    INFO,
    NAN,
    Bound,
    Limit,
    Metric,
    Suite,
    at_least_one,
    most,
    share,
    warn,
    zero,
)

_SIZE_RATIO = (Bound("sequences.min_users_ratio", 0.5), Bound("sequences.max_users_ratio", 2.0))
_LABEL_RATE = (Bound("sequences.min_label_rate", 0.002), Bound("sequences.max_label_rate", 0.998))
_LENGTH_RATIO = Bound("drift.length_ratio", (0.5, 2.0))

_FILES = (
    "check that the item files are those of the logs (their ids and their day), then build sequences again with a new"
    " attempt"
)
_CATALOGUE = "look for a change of the catalogue or of its export"
_WINDOW = "compare with the partitions before it; the events of the window are the likely cause"
_EMPTY = "check that events of every day of the window are published and that the target window covers them"


def _history_length(q: int) -> Metric:
    return Metric(
        f"history_length_p{q}",
        lambda facts: facts.length_percentile(q),
        "Recorded: events in a user's history.",
        _WINDOW,
        (Limit(INFO, low=1),),
        panel=panels.HISTORY_LENGTH,
        line=f"p{q}",
    )


def _length_to_trailing(q: int) -> Metric:
    return Metric(
        f"history_length_p{q}_to_trailing",
        lambda facts: facts.ratio(f"history_length_p{q}"),
        "Histories are as long as in partitions with as many days.",
        _WINDOW,
        warn(_LENGTH_RATIO, _LENGTH_RATIO),
    )


def _size_to_trailing(what: str) -> Metric:
    return Metric(
        f"{what}_to_trailing",
        lambda facts: facts.ratio(what),
        "About as many as in partitions with as many days.",
        _WINDOW,
        warn(*_SIZE_RATIO),
    )


ITEMS = (
    Metric(
        "items",
        lambda items: items.rows,
        "The window shows items.",
        REBUILD,
        at_least_one(),
        plant="SELECT * FROM t WHERE false",
    ),
    # Judged where there are item files, or must be. Files that describe few of the items are ordinary: critical only
    # where they describe none.
    Metric(
        "without_fields_share",
        lambda items: share(items.without_fields, items.rows) if items.described else NAN,
        "The item files describe the items.",
        _FILES,
        most(
            Bound("sequences.max_items_without_fields_share_warning", 0.2),
            Bound("sequences.max_items_without_fields_share_critical", 0.999),
        ),
    ),
    Metric(
        "train_unseen_share",
        lambda items: share(items.never_trained, items.rows),
        "Recorded: items that no training day showed.",
        _CATALOGUE,
        (Limit(INFO, high=0.5),),
        plant="SELECT * REPLACE (0 AS train_occurrences) FROM t",
    ),
    Metric("event_days", lambda items: items.event_days),
    Metric("*", lambda items: items.vocabulary_shares),
)

ITEMS_COMPARED = (
    # An item file that no longer fits the logs.
    Metric(
        "without_fields_share_rise",
        lambda items: items.rise("without_fields_share"),
        "The item files describe as many of the items as in the partitions before.",
        _FILES,
        most(
            Bound("sequences.max_items_without_fields_rise_warning", 0.1),
            Bound("sequences.max_items_without_fields_rise_critical", 0.3),
        ),
    ),
    Metric(
        "items_to_trailing",
        lambda items: items.like.ratio("items"),
        "About as many items as in the partitions before.",
        _CATALOGUE,
        warn(*_SIZE_RATIO),
    ),
    Metric(
        "new_category_share",
        lambda items: items.new_category_share,
        "Item fields have the values of the partitions before.",
        _CATALOGUE,
        warn(high=NEW_CATEGORY_SHARE),
        details=lambda items: items.new_categories,
    ),
    Metric(
        "field_psi",
        lambda items: items.field_psi,
        "Values of item fields are as frequent as in the partitions before (PSI).",
        _CATALOGUE,
        warn(high=FIELD_PSI),
        details=lambda items: items.differing_field,
    ),
)

_SIZES = (
    Metric("users", lambda facts: len(facts.user_id)),
    Metric("items", lambda facts: len(facts.item_index)),
    Metric(
        "train_targets",
        so_that="There is something to train on.",
        remedy=_EMPTY,
        limits=at_least_one(),
        count=lambda users: users.train.sum(),
        panel=panels.TARGETS,
        line="train",
        plant="SELECT * REPLACE (list_transform(target_split, x -> 2) AS target_split) FROM t",
    ),
    Metric("validation_targets", count=lambda users: users.validation.sum()),
    Metric(
        "eval_targets",
        so_that="There is something to evaluate on.",
        remedy=_EMPTY,
        limits=at_least_one(),
        count=lambda users: users.evaluation.sum(),
        panel=panels.TARGETS,
        line="eval",
        plant="SELECT * REPLACE (list_transform(target_split, x -> 0) AS target_split) FROM t",
    ),
    Metric("targets", lambda facts: facts.targets),
    Metric("history_events", count=lambda users: len(users.time_ms)),
    Metric("unseen_eval_targets", count=lambda users: users.unseen_eval_targets),
    Metric("event_days", lambda facts: facts.event_days),
)

# Where the lists of a user do not line up, what joins them has no meaning: those metrics then count 0.
_CONTRACT = (
    Metric(
        "leak_count",
        so_that="No target sees an event of its own time or later.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.leaks,
        plant="SELECT * REPLACE (list_transform(target_time_ms, x -> x - 86400000) AS target_time_ms) FROM t",
    ),
    Metric(
        "history_disorder_count",
        so_that="History times never decrease.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.disorder("history_time_ms"),
        plant="SELECT * REPLACE (list_reverse(history_time_ms) AS history_time_ms) FROM t",
    ),
    Metric(
        "target_disorder_count",
        so_that="Target times never decrease.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.disorder("target_time_ms"),
        plant="SELECT * REPLACE (list_reverse(target_time_ms) AS target_time_ms) FROM t",
    ),
    Metric(
        "unequal_length_count",
        so_that="The lists of a side are equally long.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.unequal.sum(),
        plant="SELECT * REPLACE (history_feedback[2:] AS history_feedback) FROM t",
    ),
    Metric(
        "history_end_out_of_range_count",
        so_that="target_history_end lies within the history.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.ends_out_of_range,
        plant="SELECT * REPLACE (list_transform(target_history_end, x -> x + 10000) AS target_history_end) FROM t",
    ),
    Metric(
        "item_index_out_of_range_count",
        so_that="Every item index points into items.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.unknown_items,
        plant="SELECT * REPLACE (list_transform(history_item_index, x -> x + 10000) AS history_item_index) FROM t",
    ),
    Metric(
        "item_index_not_dense_count",
        lambda facts: facts.misplaced_items,
        "items.item_index is the row's position.",
        REBUILD,
        zero(contract=True),
    ),
    Metric(
        "item_id_not_increasing_count",
        lambda facts: facts.unordered_items,
        "items is in strict item_id order.",
        REBUILD,
        zero(contract=True),
    ),
    Metric(
        "label_not_binary_count",
        so_that="Labels are 0 or 1.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.labels_not_binary,
        plant="SELECT * REPLACE (list_transform(target_label, x -> 2) AS target_label) FROM t",
    ),
    Metric(
        "watch_bucket_out_of_range_count",
        so_that="Watch buckets are those of etl.warehouse.schemas.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.unknown_watch_buckets,
        plant="SELECT * REPLACE (list_transform(history_watch_bucket, x -> 100) AS history_watch_bucket) FROM t",
    ),
    Metric(
        "target_outside_window_count",
        so_that="Targets are of the target window.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.targets_outside_window,
        plant="SELECT * REPLACE (list_transform(target_time_ms, x -> x + 86400000) AS target_time_ms) FROM t",
    ),
    Metric(
        "split_wrong_count",
        so_that="Evaluation targets are those of the evaluation days, and no others.",
        remedy=REBUILD,
        limits=zero(contract=True),
        count=lambda users: users.wrong_split,
        plant="SELECT * REPLACE (list_transform(target_split, x -> 0) AS target_split) FROM t",
    ),
    Metric(
        "repeated_user_count",
        lambda facts: facts.repeated_users,
        "A user is one row.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * REPLACE (7 AS user_id) FROM t",
    ),
    Metric(
        "unreconciled_count",
        lambda facts: facts.unreconciled,
        "The manifest's counts are the table's.",
        REBUILD,
        zero(contract=True),
        plant="SELECT * FROM t OFFSET 1",
    ),
)

_SHAPE = (
    Metric(
        "train_label_rate",
        lambda facts: share(facts.counted["train_label_rate"], facts.counted["train_targets"]),
        "The label rate is plausible.",
        _WINDOW,
        warn(*_LABEL_RATE),
        count=lambda users: users.positives(users.train),
        panel=panels.TARGET_LABEL_RATE,
        line="train",
        plant="SELECT * REPLACE (list_transform(target_label, x -> 0) AS target_label) FROM t",
    ),
    Metric(
        "eval_label_rate",
        lambda facts: share(facts.counted["eval_label_rate"], facts.counted["eval_targets"]),
        "The label rate is plausible.",
        _WINDOW,
        warn(*_LABEL_RATE),
        count=lambda users: users.positives(users.evaluation),
        panel=panels.TARGET_LABEL_RATE,
        line="eval",
        plant="SELECT * REPLACE (list_transform(target_label, x -> 1) AS target_label) FROM t",
    ),
    # Users of whom a target sees less than there is, by the limit.
    Metric(
        "truncated_user_share",
        lambda facts: share(facts.counts.get("truncated_users", 0), len(facts.user_id)),
        "Most histories are complete.",
        "raise --max-history",
        warn(high=Bound("sequences.max_truncated_user_share", 0.5)),
        panel=panels.TRUNCATED,
    ),
    Metric(
        "eval_empty_history_share",
        lambda facts: facts.eval_empty_history_share,
        "Evaluation targets have a history.",
        "compare the resolution of events.time with history.cutoff and history.of: what happens at one time never sees"
        " each other",
        most(
            Bound("sequences.max_empty_history_share_warning", 0.5),
            Bound("sequences.max_empty_history_share_critical", 0.99),
        ),
        count=lambda users: users.eval_empty_histories,
        plant="SELECT * REPLACE (list_transform(target_history_end, x -> 0) AS target_history_end) FROM t",
    ),
    *(_history_length(q) for q in (50, 90, 99)),
    Metric("hour_skew_psi", lambda facts: facts.skew("hour")),
    Metric("context_skew_psi", lambda facts: facts.skew("context")),
    Metric("history_length_skew_psi", lambda facts: facts.skew("history_length")),
)

SEQUENCES_COMPARED = (
    *(_length_to_trailing(q) for q in (50, 90, 99)),
    *(_size_to_trailing(what) for what in ("users", "targets")),
    Metric(
        "train_label_rate_to_trailing",
        lambda facts: facts.ratio("train_label_rate"),
        "The label rate is that of the partitions before.",
        _WINDOW,
        LABEL_RATE_RATIO,
    ),
)

SUITES = (
    Suite("items", "sequences", "partition: items", ITEMS, ITEMS_COMPARED),
    Suite("sequences", "sequences", "partition: sequences", (*_CONTRACT, *_SIZES, *_SHAPE), SEQUENCES_COMPARED),
)
