"""Writes large simulated KuaiRand logs fast: the published columns and quirks, nothing to learn.
`etl.datasets.simulate` is for that.

One file a local day, as its name says. A UTC day lies in two of them, so the logs go on to the end of the local day in
which the last UTC day ends: every daily run then opens two whole files.

Legend: P pages, N rows.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from etl.datasets.definition import SIMULATED_MARKER, dataset
from etl.datasets.simulate import (
    LN_MEAN_HISTORY,
    LN_SD_HISTORY,
    PAGE_SIZES,
    SHANGHAI_OFFSET_MS,
    SHARE_DUPLICATES,
    SHARE_NO_DURATION,
)
from etl.warehouse.partitions import MS_PER_DAY, add_days, day_number, dt_of_day_number

DATASET = "kuairand_simulated"
MEAN_HISTORY = float(np.exp(LN_MEAN_HISTORY + LN_SD_HISTORY**2 / 2))  # rows of a user in a month
MEAN_PAGE = 4.55
USER_VALUES = {
    "user_active_degree": ("full_active", "high_active", "middle_active", "UNKNOWN"),
    "is_video_author": ("0", "1"),
    "follow_user_num_range": ("0", "(0,10]", "(10,50]", "500+"),
    "fans_user_num_range": ("0", "[1,10)", "[10,100)", ""),
    "friend_user_num_range": ("0", "[1,5)", "[5,30)"),
    "register_days_range": ("8-14", "15-30", "31-60", "730+"),
    "onehot_feat0": ("0", "1"),
    "onehot_feat1": tuple("0123456"),
}


@dataclass(frozen=True)
class Plan:
    """What logs hold; the same plan gives the same bytes.

    Attributes:
        rows: distinct rows within the UTC days; duplicates and the rest of the last local day come on top.
        items: items of the catalogue; the popularity of the r-th goes with r ** -0.8.
        length_sd: spread of the log of the users' rows; 0 gives all users as many.
    """

    rows: int
    users: int
    days: int = 30
    items: int = 1_000_000
    first_dt: str = "2022-04-08"
    length_sd: float = LN_SD_HISTORY
    seed: int = 7

    @property
    def last_dt(self) -> str:
        return add_days(self.first_dt, self.days - 1)


@dataclass(frozen=True)
class Pages:
    """Exposures shown together.

    One user, one time. `user`, `time_ms`, `size`: int64 [P], by local day, user and time.
    """

    user: np.ndarray
    time_ms: np.ndarray
    size: np.ndarray

    @property
    def local_day(self) -> np.ndarray:
        return (self.time_ms + SHANGHAI_OFFSET_MS) // MS_PER_DAY


def write_logs(plan: Plan, folder: Path, log: Callable[[str], None]) -> dict[str, int]:
    """Write the logs, the item and the user file; return the rows of each file."""
    folder.mkdir(parents=True)
    pages = draw_pages(plan)
    days, start = np.unique(pages.local_day, return_index=True)
    stop = [*start[1:].tolist(), len(pages.user)]
    written: dict[str, int] = {}

    def write(number: int) -> tuple[str, int]:
        part = Pages(*(values[start[number] : stop[number]] for values in (pages.user, pages.time_ms, pages.size)))
        table = log_rows(plan, part, np.random.default_rng((plan.seed, number)))
        day = dt_of_day_number(int(days[number]))
        short = f"{int(day[5:7])}_{day[8:]}"
        name = f"log_standard_{short}_to_{short}_bench.csv"
        _write_csv(table, folder / name)
        return name, table.num_rows

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done, (name, rows) in enumerate(pool.map(write, range(len(days))), 1):
            written[name] = rows
            if done % 10 == 0 or done == len(days):
                log(f"{done} of {len(days)} log files written, {sum(written.values()):,} rows")
    rng = np.random.default_rng((plan.seed, 1_000))
    _write_csv(_item_rows(plan, rng), folder / "video_features_basic_bench.csv")
    _write_csv(_user_rows(plan, rng), folder / "user_features_bench.csv")
    (folder / SIMULATED_MARKER).write_text(
        json.dumps({"simulated": True, "parameters": asdict(plan), "rows": sum(written.values())})
    )
    return written


def draw_pages(plan: Plan) -> Pages:
    """Draw every page; each UTC day has as many rows as the others, up to a page."""
    rng = np.random.default_rng(plan.seed)
    per_day = -(-plan.rows // plan.days) + max(PAGE_SIZES)
    weight = np.exp(rng.normal(0, plan.length_sd, plan.users))
    lengths = np.maximum(5, np.ceil(weight / weight.sum() * per_day * (plan.days + 1)).astype(np.int64))
    total = int(lengths.sum())
    first_of_user = np.cumsum(lengths) - lengths
    cuts = np.cumsum(rng.choice(PAGE_SIZES, int(total / MEAN_PAGE * 1.1) + 100, p=(0.15, 0.15, 0.25, 0.25, 0.2)))
    first_row = np.union1d(first_of_user, cuts[cuts < total])
    size = np.diff(first_row, append=total)
    user = np.searchsorted(first_of_user, first_row, side="right") - 1
    # Days are dealt to pages in random order, a full day at a time.
    order = rng.permutation(len(size))
    day = np.empty(len(size), np.int64)
    day[order] = np.minimum((np.cumsum(size[order]) - size[order]) // per_day, plan.days)
    shape = 1.2 + np.cos((np.arange(24) - 12) / 24 * 2 * np.pi)
    in_day = rng.choice(24, len(size), p=shape / shape.sum()) * 3_600_000 + rng.integers(0, 3_600_000, len(size))
    time_ms = (day_number(plan.first_dt) + day) * MS_PER_DAY + in_day
    within = (day < plan.days) | (in_day < MS_PER_DAY - SHANGHAI_OFFSET_MS)
    user, time_ms, size = user[within], time_ms[within], size[within]
    order = np.lexsort((time_ms, user, (time_ms + SHANGHAI_OFFSET_MS) // MS_PER_DAY))
    return Pages(user[order], time_ms[order], size[order])


def log_rows(plan: Plan, pages: Pages, rng: np.random.Generator, duplicates: float = SHARE_DUPLICATES) -> pa.Table:
    """Return the rows of some pages with the published columns, in the pages' order."""
    n = int(pages.size.sum())
    user, time_ms = np.repeat(pages.user, pages.size), np.repeat(pages.time_ms, pages.size)
    rank = (plan.items * rng.random(n) ** 5).astype(np.int64)
    item = rank * 7_919 % plan.items  # popular items are anywhere among the ids
    click = rng.random(n) < 0.37
    duration = _durations(item)
    play = (
        rng.gamma(np.where(click, 4.0, 1.2), np.where(click, 0.3, 0.12)) * np.where(duration > 0, duration, 5_000)
    ).astype(np.int64)
    # The server logs late: for 18 % of the rows one hour after the event.
    logged_ms = time_ms + SHANGHAI_OFFSET_MS + np.where(rng.random(n) < 0.18, 3_600_000, 0)
    days, inverse = np.unique(logged_ms // MS_PER_DAY, return_inverse=True)

    def rare(share: float) -> np.ndarray:
        return (click & (rng.random(n) < share)).astype(np.int8)

    profile = rare(0.02)
    columns = {
        "user_id": user,
        "video_id": item,
        "date": np.array([int(dt_of_day_number(int(d)).replace("-", "")) for d in days])[inverse],
        "hourmin": logged_ms % MS_PER_DAY // 3_600_000 * 100,
        "time_ms": time_ms,
        "is_click": click.astype(np.int8),
        "is_like": rare(0.05),
        "is_follow": rare(0.004),
        "is_comment": rare(0.01),
        "is_forward": rare(0.004),
        "is_hate": (~click & (rng.random(n) < 0.002)).astype(np.int8),
        "long_view": (click & (play >= np.minimum(18_000, np.where(duration > 0, duration, 18_000)))).astype(np.int8),
        "play_time_ms": play,
        "duration_ms": duration,
        "profile_stay_time": profile * rng.integers(500, 20_000, n),
        "comment_stay_time": rare(0.03) * rng.integers(500, 30_000, n),
        "is_profile_enter": profile,
        "is_rand": np.zeros(n, np.int8),
        "tab": rng.choice(np.array([1, 0, 4, 2, 6]), n, p=(0.67, 0.2, 0.08, 0.03, 0.02)),
    }
    table = pa.table({name: columns[name] for name in dataset(DATASET).logs.columns})
    if not duplicates:
        return table
    return table.take(pa.array(np.repeat(np.arange(n), 1 + (rng.random(n) < duplicates))))


def _durations(item: np.ndarray) -> np.ndarray:
    """Return milliseconds that hang on the item only, 0 for pictures."""
    mixed = (item.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    u = (mixed >> np.uint64(40)).astype(np.float64) / 2**24
    return np.where(u < SHARE_NO_DURATION, 0, np.exp(8.0 + 5.0 * (u - SHARE_NO_DURATION) ** 2)).astype(np.int64)


def _item_rows(plan: Plan, rng: np.random.Generator) -> pa.Table:
    n = plan.items
    item = np.arange(n)
    duration = _durations(item)
    tag = pa.array(rng.integers(0, 60, n)).cast(pa.string())
    second = pc.binary_join_element_wise(tag, pa.array(rng.integers(0, 60, n)).cast(pa.string()), ",")
    kind = rng.random(n)
    tags = pc.case_when(pc.make_struct(pa.array(kind < 0.15), pa.array(kind < 0.995)), second, tag)

    def one_of(*values: str) -> pa.Array:
        return pa.array(values).take(pa.array(rng.integers(0, len(values), n)))

    return pa.table(
        {
            "video_id": item,
            "author_id": rng.integers(0, max(2, n // 5), n),
            "video_type": one_of(*["NORMAL"] * 49, "AD"),
            "upload_dt": one_of(plan.first_dt),
            "upload_type": one_of("LongImport", "ShortImport", "Kmovie", "Web"),
            "visible_status": one_of("0.0"),
            "video_duration": pa.array(duration.astype(float), mask=duration == 0),
            "server_width": one_of("720.0"),
            "server_height": one_of("1280.0"),
            "music_id": rng.integers(0, 9_500_000_000, n),
            "music_type": one_of("9.0"),
            "tag": tags,
        }
    )


def _user_rows(plan: Plan, rng: np.random.Generator) -> pa.Table:
    values = {
        name: pa.array(some).take(pa.array(rng.integers(0, len(some), plan.users)))
        for name, some in USER_VALUES.items()
    }
    return pa.table({"user_id": np.arange(plan.users), **values})


def _write_csv(table: pa.Table, path: Path) -> None:
    """Write with a bare header line, as the published files have it."""
    with path.open("wb") as stream:
        stream.write((",".join(table.column_names) + "\n").encode())
        pacsv.write_csv(table, stream, pacsv.WriteOptions(include_header=False, quoting_style="needed"))
