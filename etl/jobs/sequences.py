"""Build `items` and `sequences` of a partition from the published events of its window.

One task a bucket: the window's sorted days are concatenated and stably sorted by user, so no history is ever shuffled. A
target sees the events strictly earlier than itself: exposures of one page share one timestamp and never see each other.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from etl.cli import definition_of, log, partition_parser, run_stage, store_of
from etl.datasets import DatasetDefinition
from etl.errors import StageError
from etl.partitions import MS_PER_DAY, Window, day_number
from etl.raw import RawLocation, read_feature_csv
from etl.schemas import ITEMS, SEQUENCES, WATCH_RATIO_EDGES, schema_fingerprint
from etl.spark import spark_session
from etl.store import DataFile, Manifest, TableStore, code_version

_CATEGORY = re.compile(r"\s*[0-9]{1,9}\s*\Z")


@dataclass(frozen=True)
class HistoryRule:
    """What a target may see.

    Attributes:
        cutoff: `event`: everything strictly before the target's time; `day_start`: strictly before its UTC day, as a
            system sees it whose caches are refreshed once a day.
        availability_lag_ms: feedback is known only so long after the event.
        max_history: at most so many of the latest visible events.
    """

    cutoff: str = "event"
    availability_lag_ms: int = 0
    max_history: int = 4_000


def main() -> None:
    parser = partition_parser(__doc__)
    parser.add_argument("--raw", required=True, help="folder or URI of the raw user and item files")
    parser.add_argument("--target-days", type=int, default=14, help="days, dt included, whose impressions are targets")
    parser.add_argument("--lookback-days", type=int, default=30, help="days, dt included, whose events may stand in a history")
    parser.add_argument("--max-history", type=int, default=4_000, help="latest events that a target may see")
    parser.add_argument("--history-cutoff", choices=("event", "day_start"), default="event")
    parser.add_argument("--availability-lag-ms", type=int, default=0)
    args = parser.parse_args()
    definition, store = definition_of(args), store_of(args)
    window = Window(args.dt, args.target_days, args.lookback_days)
    rule = HistoryRule(args.history_cutoff, args.availability_lag_ms, args.max_history)
    if rule.max_history < 1 or rule.availability_lag_ms < 0:
        raise StageError("--max-history must be at least 1 and --availability-lag-ms at least 0", "correct them")
    counts = build_sequences(store, definition, RawLocation(args.raw), window, rule, args.attempt)
    log("  ".join(f"{name} {value:,}" for name, value in counts.items()))


def build_sequences(store: TableStore, definition: DatasetDefinition, raw: RawLocation, window: Window, rule: HistoryRule, attempt: str) -> dict[str, int]:
    """Stage `items` and `sequences` of a partition; return the counts of `sequences`.

    Raises:
        StageError: a day of the window is not published.
    """
    dt = window.dt
    manifests = [store.require("events", day) for day in window.event_days]
    layouts = {str(m.settings.get("buckets")): m.dt for m in manifests if m.rows}
    if len(layouts) > 1:  # a user would lie in several buckets and get a row in each
        raise StageError(f"events of the window are cut into different numbers of buckets: {', '.join(f'{n} on {day}' for n, day in sorted(layouts.items()))}",
                         f"build events for {dt} again with one --buckets and --lookback-days {window.lookback_days}: it builds the other days anew")
    buckets = sorted({file.bucket for m in manifests for file in m.files})
    if not manifests[-1].rows:
        raise StageError(f"events of dt={dt} are empty", "build events for that day first")
    users = _user_fields(raw, definition)
    for table in ("items", "sequences"):
        store.clear_staging(attempt, table, dt)
    warehouse, dataset, texts = store.warehouse, store.dataset, [m.to_json() for m in manifests]
    spark = spark_session(attempt)
    try:
        context = spark.sparkContext
        days = context.broadcast(texts)
        log(f"window {window.event_days[0]} .. {dt}: {sum(m.rows for m in manifests):,} events in {len(buckets)} bucket(s)")

        def count_items(bucket: int) -> bytes:
            here = TableStore(warehouse, dataset)
            parts = [_counted(here, Manifest.from_json(text), bucket, dt) for text in days.value]
            return _to_ipc(_summed(parts))

        def build(bucket: int) -> str:
            here = TableStore(warehouse, dataset)
            events = pa.concat_tables([here.read(Manifest.from_json(text), bucket=bucket) for text in days.value])
            rows, counts = sequence_rows(events, known.value, user_table.value, window, rule, definition.label_bit)
            file = asdict(here.write_file(attempt, "sequences", dt, bucket, rows)) if rows.num_rows else None
            return json.dumps({"file": file, "counts": counts})

        totals = _summed([_from_ipc(part) for part in context.parallelize(buckets, len(buckets)).map(count_items).collect()])
        items = item_rows(totals, _item_fields(raw, definition), f"the file {definition.item_glob} in {raw.uri}")
        item_file = store.write_file(attempt, "items", dt, 0, items)
        known, user_table = context.broadcast(items["item_id"].to_numpy()), context.broadcast(users)
        results = [json.loads(text) for text in context.parallelize(buckets, len(buckets)).map(build).collect()]
    finally:
        spark.stop()
    inputs = {store.input_name(m): m.data_digest for m in manifests}
    version = code_version()
    settings = {"target_days": window.target_days, "lookback_days": window.lookback_days, **asdict(rule)}
    counts = {name: sum(r["counts"][name] for r in results) for name in results[0]["counts"]}
    store.write_staged_manifest(Manifest(dataset, "items", dt, attempt, schema_fingerprint(ITEMS), version, (item_file,),
                                         {"items": items.num_rows, "without_fields": int(pc.sum(pc.is_null(items["item_type"])).as_py() or 0)}, inputs, settings))
    files = tuple(DataFile(**r["file"]) for r in results if r["file"])
    store.write_staged_manifest(Manifest(dataset, "sequences", dt, attempt, schema_fingerprint(SEQUENCES), version, files, counts, inputs, settings))
    return counts


def sequence_rows(events: pa.Table, item_ids: np.ndarray, users: dict[int, list[str]], window: Window, rule: HistoryRule, label_bit: int) -> tuple[pa.Table, dict[str, int]]:
    """Turn one bucket's events (days in order, each sorted by user and time) into rows with the SEQUENCES schema.

    Args:
        item_ids: int64 [N], sorted; an item's index is its position.
        users: user id -> field values.
        label_bit: bit of `feedback` that is the label.

    Returns:
        the rows, sorted by user, and their counts.
    """
    user = events["user_id"].to_numpy()
    time_ms = events["event_time_ms"].to_numpy()
    order = np.argsort(user, kind="stable")
    user, time_ms = user[order], time_ms[order]
    is_target = time_ms >= day_number(window.first_target_dt) * MS_PER_DAY
    # Users without a target have no row.
    owners, owner = np.unique(user, return_inverse=True)
    with_target = np.zeros(len(owners), dtype=bool)
    with_target[owner[is_target]] = True
    keep = with_target[owner]
    order, user, time_ms, is_target = order[keep], user[keep], time_ms[keep], is_target[keep]
    owners, owner = np.unique(user, return_inverse=True)
    start = np.searchsorted(owner, np.arange(len(owners) + 1))
    target = np.flatnonzero(is_target)
    target_owner = owner[target]
    end = visible_ends(owner, time_ms, start, target, rule)
    # Keep the latest max_history events before every target: the first target of a user decides where his history begins.
    target_start = np.searchsorted(target_owner, np.arange(len(owners) + 1))
    first_end = end[target_start[:-1]]
    last_end = end[target_start[1:] - 1]
    trim = np.maximum(0, first_end - rule.max_history)
    kept_from, kept_to = start[:-1] + trim, start[:-1] + last_end
    lengths = kept_to - kept_from
    history_start = np.concatenate([[0], np.cumsum(lengths)])
    history = np.repeat(kept_from - history_start[:-1], lengths) + np.arange(history_start[-1])
    feedback = events["feedback"].to_numpy()[order]
    watch = watch_bucket(events["watch_time_ms"].to_numpy()[order], events["duration_ms"].to_numpy()[order])
    index = np.searchsorted(item_ids, events["item_id"].to_numpy()[order]).astype(np.int32)
    tab = events["tab"].to_numpy()[order]
    none = [""] * (len(next(iter(users.values()))) if users else 0)

    def lists(values: np.ndarray, offsets: np.ndarray, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values, kind))

    rows = pa.table(
        {
            "user_id": pa.array(owners, pa.int64()),
            "user_fields": pa.array([users.get(int(u), none) for u in owners], pa.list_(pa.string())),
            "history_item_index": lists(index[history], history_start, pa.int32()),
            "history_time_ms": lists(time_ms[history], history_start, pa.int64()),
            "history_feedback": lists(feedback[history], history_start, pa.int16()),
            "history_watch_bucket": lists(watch[history], history_start, pa.int8()),
            "target_item_index": lists(index[target], target_start, pa.int32()),
            "target_time_ms": lists(time_ms[target], target_start, pa.int64()),
            "target_label": lists((feedback[target] >> label_bit & 1).astype(np.int8), target_start, pa.int8()),
            "target_tab": lists(tab[target], target_start, pa.int16()),
            "target_history_end": lists((end - trim[target_owner]).astype(np.int32), target_start, pa.int32()),
        },
        schema=SEQUENCES,
    )
    evaluated = int((time_ms[target] >= day_number(window.dt) * MS_PER_DAY).sum())
    counts = {"users": len(owners), "targets": len(target), "train_targets": len(target) - evaluated, "eval_targets": evaluated,
              "history_events": int(history_start[-1]), "truncated_users": int((trim > 0).sum())}
    return rows, counts


def visible_ends(owner: np.ndarray, time_ms: np.ndarray, start: np.ndarray, target: np.ndarray, rule: HistoryRule) -> np.ndarray:
    """Return, per target, how many of its user's events it may see: those strictly before its cut-off.

    Args:
        owner: int64 [E], position of the event's user, ascending; time_ms: int64 [E], ascending within a user.
        start: int64 [U + 1], offsets of the users; target: positions of the targets.
    """
    cut = time_ms[target]
    if rule.cutoff == "day_start":
        cut = cut // MS_PER_DAY * MS_PER_DAY
    cut = cut - rule.availability_lag_ms
    # (user, time) as one ascending number, so that one search serves all users.
    base = int(time_ms.min(initial=0)) - rule.availability_lag_ms - MS_PER_DAY
    span = int(time_ms.max(initial=0)) - base + 1
    key = owner * span + (time_ms - base)
    return np.searchsorted(key, owner[target] * span + (cut - base), side="left") - start[owner[target]]


def watch_bucket(watch_time_ms: np.ndarray, duration_ms: np.ndarray) -> np.ndarray:
    """Return int8 buckets of watch_time / duration (see schemas.WATCH_RATIO_EDGES)."""
    ratio = watch_time_ms / np.maximum(duration_ms, 1)
    bucket = 2 + np.searchsorted(np.array(WATCH_RATIO_EDGES), ratio, side="right")
    bucket = np.where(watch_time_ms <= 0, 1, bucket)
    return np.where(duration_ms <= 0, 0, bucket).astype(np.int8)


def item_rows(counts: pa.Table, fields: pa.Table | None, source: str = "the item file") -> pa.Table:
    """Return rows with the ITEMS schema: every counted item in item_id order, joined to its static fields.

    Args:
        counts: item_id, train_occurrences; sorted by item_id.
        fields: the item file as text, or None; the first row of an item counts.
        source: what messages call that file.

    Raises:
        StageError: an id or a number of the file is none.
    """
    ids = counts["item_id"].to_numpy()
    n = len(ids)
    position, found = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=bool)
    if fields is not None and fields.num_rows:
        known = _ids(fields, "video_id", source)
        unique, first = np.unique(known, return_index=True)
        place = np.minimum(np.searchsorted(unique, ids), len(unique) - 1)
        found = unique[place] == ids
        position = first[place]

    def text(name: str) -> pa.Array:
        if fields is None or not fields.num_rows:
            return pa.nulls(n, pa.string())
        values = fields[name].combine_chunks().take(pa.array(position, mask=~found))
        return pc.if_else(pc.equal(values, ""), pa.scalar(None, pa.string()), values)

    # A part of a tag that is no category number (text, or wider than the column) is left out.
    tags = [[] if t is None else [int(part) for part in t.split(",") if _CATEGORY.match(part)] for t in text("tag").to_pylist()]
    return pa.table(
        {
            "item_index": pa.array(np.arange(n), pa.int32()),
            "item_id": pa.array(ids, pa.int64()),
            "train_occurrences": counts["train_occurrences"].cast(pa.int64()),
            "author_id": _whole_numbers(text("author_id"), "author_id", source),
            "categories": pa.array(tags, pa.list_(pa.int32())),
            "duration_ms": _whole_numbers(text("video_duration"), "video_duration", source),
            "item_type": text("video_type"),
            "upload_type": text("upload_type"),
        },
        schema=ITEMS,
    )


def _user_fields(raw: RawLocation, definition: DatasetDefinition) -> dict[int, list[str]]:
    table = read_feature_csv(raw, definition.user_glob, definition)
    if table is None:
        log(f"no user file matches {definition.user_glob} in {raw.uri}: user fields are empty")
        return {}
    _require_columns(table, ("user_id", *definition.user_fields), definition.user_glob, raw)
    columns = [table[name].to_pylist() for name in definition.user_fields]
    ids = _ids(table, "user_id", f"the file {definition.user_glob} in {raw.uri}").tolist()
    return {user: list(values) for user, values in reversed(list(zip(ids, zip(*columns, strict=True), strict=True)))}


def _item_fields(raw: RawLocation, definition: DatasetDefinition) -> pa.Table | None:
    table = read_feature_csv(raw, definition.item_glob, definition)
    if table is None:
        log(f"no item file matches {definition.item_glob} in {raw.uri}: item fields are empty")
        return None
    _require_columns(table, ("video_id", "author_id", "video_duration", "video_type", "upload_type", "tag"), definition.item_glob, raw)
    return table


def _whole_numbers(values: pa.Array, column: str, source: str) -> pa.Array:
    """Return text as int64: digits, or digits with the empty fraction that a column with gaps is published with."""
    wrong = values.filter(pc.invert(pc.match_substring_regex(values, r"\A-?[0-9]{1,18}(\.0*)?\z")))
    if len(wrong):
        raise StageError(f"the column {column} of {source} holds {wrong[0].as_py()[:40]!r}, which is no whole number", "mend that value, or deliver the file again")
    return pc.replace_substring_regex(values, r"\.0*\z", "").cast(pa.int64())


def _ids(table: pa.Table, column: str, source: str) -> np.ndarray:
    values = table[column].combine_chunks()
    if values.null_count:
        raise StageError(f"the column {column} of {source} has {values.null_count:,} row(s) without a value", "mend them, or deliver the file again")
    return _whole_numbers(values, column, source).to_numpy()


def _require_columns(table: pa.Table, names: tuple[str, ...], glob: str, raw: RawLocation) -> None:
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise StageError(f"the file {glob} in {raw.uri} lacks the column {', '.join(missing)}", "deliver the file with the published columns")


def _counted(store: TableStore, manifest: Manifest, bucket: int, dt: str) -> pa.Table:
    ids, counts = np.unique(store.read(manifest, ["item_id"], bucket)["item_id"].to_numpy(), return_counts=True)
    return pa.table({"item_id": ids, "train_occurrences": counts if manifest.dt < dt else np.zeros_like(counts)})


def _summed(parts: list[pa.Table]) -> pa.Table:
    summed = pa.concat_tables(parts).group_by("item_id").aggregate([("train_occurrences", "sum")])
    return summed.rename_columns({"train_occurrences_sum": "train_occurrences"}).sort_by("item_id")


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_ipc(body: bytes) -> pa.Table:
    return pa.ipc.open_stream(body).read_all()


if __name__ == "__main__":
    run_stage(main)
