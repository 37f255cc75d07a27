"""Simulated KuaiRand logs: the exact column layout, the real data's quirks, and a planted long-term interest.

Every user has a lasting taste for each of the topics; whether they click depends on their taste for the item's topic.
Tastes are drawn independently, so only their own past feedback on that topic reveals them, and topics recur rarely: a
model that sees the recent past knows little, one that attends to all of it knows much. Because the click probability is
known, so is the best AUC that any model can reach; it is printed and stored in SIMULATED.json beside the logs.

With a random share there is a randomly exposed log too, as KuaiRand has one: some pages show one more item, any of all
with the same chance, while the standard log shows popular ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from etl.datasets.definition import SIMULATED_MARKER, DatasetDefinition, dataset
from etl.stage.commands import log, run_stage
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY, day_number, dt_of_day_number, parse_dt

SHANGHAI_OFFSET_MS = 8 * 3_600_000
LN_MEAN_HISTORY, LN_SD_HISTORY = 8.97, 0.96  # of KuaiRand-27K's exposures per user
SHARE_NO_DURATION = 0.18
SHARE_DUPLICATES = 0.003
SHARE_REPEATS = 0.03
PAGE_SIZES = (1, 2, 4, 6, 8)
SIMULATOR_VERSION = 1


@dataclass(frozen=True)
class Simulation:
    """Parameters of one simulation; the same ones give the same bytes.

    Attributes:
        length_scale: factor on the real history lengths (log-normal, ln mean 8.97, sd 0.96).
        taste_sd: spread of a user's taste over topics, in logits.
        taste_days: mean days after which a user's taste for a topic is drawn anew; 0 = it lasts.
        random_share: rows of the randomly exposed log over those of the standard one, at most 1, on average; 0 = there
            is no such log. The standard log has the same bytes for every share.
    """

    users: int = 1_000
    first_dt: str = "2022-04-08"
    days: int = 14
    length_scale: float = 0.04
    items: int = 4_000
    topics: int = 40
    taste_sd: float = 1.6
    taste_days: float = 0.0
    random_share: float = 0.0
    seed: int = 7
    version: int = SIMULATOR_VERSION


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for the raw files; it is made anew")
    defaults = Simulation()
    parser.add_argument("--users", type=int, default=defaults.users)
    parser.add_argument("--first-dt", default=defaults.first_dt, help="first UTC day")
    parser.add_argument("--days", type=int, default=defaults.days, help="UTC days")
    parser.add_argument(
        "--length-scale", type=float, default=defaults.length_scale, help="factor on the real history lengths"
    )
    parser.add_argument("--items", type=int, default=defaults.items)
    parser.add_argument(
        "--random-share", type=float, default=defaults.random_share, help="rows of the random log over others, 0 to 1"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args()
    simulation = Simulation(
        users=args.users,
        first_dt=parse_dt(args.first_dt),
        days=args.days,
        length_scale=args.length_scale,
        items=args.items,
        random_share=args.random_share,
        seed=args.seed,
    )
    if not 0 <= simulation.random_share <= 1:
        raise StageError(f"the random share is {simulation.random_share}", "give one from 0 to 1")
    if min(simulation.users, simulation.days, simulation.items) < 1 or simulation.length_scale <= 0:
        raise StageError("users, days, items and length scale must be positive", "give larger numbers")
    marker = write_simulation(simulation, Path(args.out))
    log(
        f"SIMULATED KuaiRand logs in {args.out}: {marker['rows']:,} rows, {simulation.users:,} users, seed"
        f" {simulation.seed}"
    )
    log(
        "best reachable AUC (the score is the true probability): "
        + "  ".join(f"{dt} {auc:.4f}" for dt, auc in marker["best_auc_by_dt"].items())
    )


def write_simulation(simulation: Simulation, out: Path) -> dict:
    """Write the raw files into `out`, whole or not at all; return the marker. The same simulation there is reused.

    Raises:
        StageError: `out` holds something that is not a simulation, or the days leave the year of the data set.
    """
    first = day_number(simulation.first_dt)
    year = _definition().first_day.year
    # The file names carry no year; the last UTC day ends in the next local one.
    if {dt_of_day_number(n)[:4] for n in (first, first + simulation.days)} != {str(year)}:
        raise StageError(
            f"{simulation.days} day(s) from {simulation.first_dt} leave the year {year}, which the file names"
            " stand for",
            f"choose --first-dt and --days within {year}",
        )
    marker_file = out / SIMULATED_MARKER
    if marker_file.exists():
        marker = json.loads(marker_file.read_text())
        # Logs from before a parameter came have its default.
        if asdict(Simulation()) | marker["parameters"] == asdict(simulation):
            return marker
    elif out.exists() and any(out.iterdir()):
        raise StageError(
            f"{out} is not empty and holds no simulation", "choose another --out: real logs are never overwritten"
        )
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        marker = _write_all(simulation, temporary)
        (temporary / SIMULATED_MARKER).write_text(json.dumps(marker, indent=1))
        shutil.rmtree(out, ignore_errors=True)
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return marker


def _definition() -> DatasetDefinition:
    return dataset("kuairand_simulated")


def _write_all(simulation: Simulation, folder: Path) -> dict:
    rng = np.random.default_rng(simulation.seed)
    items = _items(simulation, rng)
    standard, taste_DUK = _standard(simulation, items, rng)
    log_columns = _log_columns(standard, items, rng)
    duplicated = rng.random(len(standard.user)) < SHARE_DUPLICATES
    order = np.concatenate([np.arange(len(duplicated)), np.flatnonzero(duplicated)])
    order = order[np.lexsort((order, standard.time_ms[order], standard.user[order]))]
    local_day = (standard.time_ms[order] + SHANGHAI_OFFSET_MS) // MS_PER_DAY
    # Two files, as published: the names say which local days they span.
    middle = (int(local_day.min()) + int(local_day.max())) // 2
    for chosen in (local_day <= middle, local_day > middle):
        _write_log({name: values[order][chosen] for name, values in log_columns.items()}, "standard", folder)
    _write_items(items, simulation, folder, rng)
    _write_users(simulation, folder, rng)
    by_chance, rng = _by_chance(simulation, standard, items, taste_DUK)
    chance_columns = _log_columns(by_chance, items, rng) | {"is_rand": np.ones(len(by_chance.user), np.int64)}
    _write_log(chance_columns, "random", folder)
    shown = standard.and_also(by_chance)
    click = np.concatenate([log_columns["is_click"], chance_columns["is_click"]])
    best_auc, best_gauc = _best_by_day(shown, click)
    return {
        "simulated": True,
        "parameters": asdict(simulation),
        "rows": len(order) + len(by_chance.user),
        "duplicates": int(duplicated.sum()),
        "click_rate": float(click.mean()),
        "best_auc_by_dt": best_auc,
        "best_gauc_by_dt": best_gauc,
    }


def _write_log(columns: dict[str, np.ndarray], kind: str, folder: Path) -> None:
    """Write a log file; none without rows."""
    if len(columns["time_ms"]):
        local_day = (columns["time_ms"] + SHANGHAI_OFFSET_MS) // MS_PER_DAY
        first, last = (_short(dt_of_day_number(int(n))) for n in (local_day.min(), local_day.max()))
        table = pa.table({name: columns[name] for name in _definition().logs.columns})
        _write_csv(table, folder / f"log_{kind}_{first}_to_{last}_sim.csv")


@dataclass(frozen=True)
class _Shown:
    """Exposures.

    Attributes:
        user, item, time_ms: int64 [E]; probability: float64 [E], of a click.
    """

    user: np.ndarray
    item: np.ndarray
    time_ms: np.ndarray
    probability: np.ndarray

    def and_also(self, other: _Shown) -> _Shown:
        """Return these and behind them others."""
        return _Shown(*map(np.concatenate, zip(vars(self).values(), vars(other).values(), strict=True)))


def _items(simulation: Simulation, rng: np.random.Generator) -> dict[str, np.ndarray]:
    n = simulation.items
    popularity = 1.0 / np.arange(1, n + 1) ** 0.8  # Zipf
    return {
        "popularity": popularity / popularity.sum(),
        "topic": rng.permutation(np.resize(np.arange(simulation.topics), n)),
        "quality": rng.normal(0, 0.3, n),
        "duration_ms": np.where(
            rng.random(n) < SHARE_NO_DURATION, 0, np.exp(rng.normal(9.8, 0.9, n)).astype(np.int64).clip(1_000, 600_000)
        ),
        "author_id": rng.integers(0, max(2, n // 5), n),
    }


def _standard(
    simulation: Simulation, items: dict[str, np.ndarray], rng: np.random.Generator
) -> tuple[_Shown, np.ndarray]:
    """Return the exposures of the standard log, and the users' tastes, float64 [days or 1, users, topics].

    The order of the draws, in here and in what it calls, is part of the simulation: another gives other logs.
    """
    user, time_ms = _exposures(simulation, rng)
    item = _shown(simulation, items["popularity"], user, rng)
    taste_DUK = _tastes(simulation, rng)
    return _with_probability(simulation, items, taste_DUK, user, item, time_ms), taste_DUK


def _by_chance(
    simulation: Simulation, standard: _Shown, items: dict[str, np.ndarray], taste_DUK: np.ndarray
) -> tuple[_Shown, np.random.Generator]:
    """Return the exposures of the random log: one more item on pages of the standard one, any with the same chance.

    They have a generator of their own, returned for what else is drawn of them: the standard log does not change.
    """
    rng = np.random.default_rng((simulation.seed, 1))
    chosen = rng.random(len(standard.user)) < simulation.random_share
    user, time_ms = standard.user[chosen], standard.time_ms[chosen]
    item = rng.integers(0, simulation.items, len(user))
    return _with_probability(simulation, items, taste_DUK, user, item, time_ms), rng


def _with_probability(
    simulation: Simulation,
    items: dict[str, np.ndarray],
    taste_DUK: np.ndarray,
    user: np.ndarray,
    item: np.ndarray,
    time_ms: np.ndarray,
) -> _Shown:
    day = time_ms // MS_PER_DAY - day_number(simulation.first_dt)
    taste = taste_DUK[0 if len(taste_DUK) == 1 else day, user, items["topic"][item]]
    logit = -0.6 + taste + items["quality"][item]
    return _Shown(user, item, time_ms, 1 / (1 + np.exp(-logit)))


def exposures(simulation: Simulation) -> dict[str, np.ndarray]:
    """Return `user_id`, `item_id`, `time_ms` and `probability` (of a click) of every exposure that the logs of a
    simulation show, those of the random log last: what no log says.
    """
    rng = np.random.default_rng(simulation.seed)
    items = _items(simulation, rng)
    standard, taste_DUK = _standard(simulation, items, rng)
    shown = standard.and_also(_by_chance(simulation, standard, items, taste_DUK)[0])
    return dict(zip(("user_id", "item_id", "time_ms", "probability"), vars(shown).values(), strict=True))


def true_probabilities(logs: Path, user: np.ndarray, item: np.ndarray, time_ms: np.ndarray) -> np.ndarray:
    """Return the probability of a click of some exposures of a folder of simulated logs, float64 [E].

    Raises:
        StageError: the folder holds no simulation, or it shows no such exposure.
    """
    marker = logs / SIMULATED_MARKER
    if not marker.is_file():
        raise StageError(f"{logs} holds no simulation", "give the folder that etl.datasets.simulate wrote")
    shown = exposures(Simulation(**json.loads(marker.read_text())["parameters"]))
    # An item that a page shows twice has one probability: any of its rows will do.
    order = np.lexsort((shown["item_id"], shown["time_ms"], shown["user_id"]))
    known = np.stack([shown[name][order] for name in ("user_id", "time_ms", "item_id")], 1)
    asked = np.stack([user, time_ms, item], 1)
    keys = np.unique(np.concatenate([known, asked]), axis=0, return_inverse=True)[1].reshape(-1)
    row = np.searchsorted(keys[: len(known)], keys[len(known) :])
    row = np.minimum(row, len(known) - 1)
    if len(asked) and (strange := keys[: len(known)][row] != keys[len(known) :]).any():
        user_id, at, item_id = asked[np.flatnonzero(strange)[0]]
        raise StageError(
            f"{int(strange.sum()):,} exposures are not in {logs}, such as user {user_id}, item {item_id} at {at}",
            "give the logs that were scored",
        )
    return shown["probability"][order][row]


def _exposures(simulation: Simulation, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return user and time_ms of every exposure, by user and time; the exposures of one page share one time_ms."""
    wished = np.exp(rng.normal(LN_MEAN_HISTORY, LN_SD_HISTORY, simulation.users)) * simulation.length_scale
    lengths = wished.astype(np.int64).clip(5)
    total = int(lengths.sum())
    user = np.repeat(np.arange(simulation.users), lengths)
    page_size = rng.choice(PAGE_SIZES, total, p=(0.15, 0.15, 0.25, 0.25, 0.2))
    page_end = np.cumsum(page_size)
    page = np.searchsorted(page_end, np.arange(total), side="right")
    # Pages were cut through the exposures of all users at once: numbered anew, none is shared by two users.
    first_of_user = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    page = (
        page
        - page[first_of_user].repeat(lengths)
        + np.repeat(
            np.cumsum(np.concatenate([[0], (page[first_of_user + lengths - 1] - page[first_of_user] + 1)[:-1]])),
            lengths,
        )
    )
    pages = int(page.max()) + 1
    page_user = np.zeros(pages, np.int64)
    page_user[page] = user
    hour = rng.choice(24, pages, p=_hour_profile())
    page_time = (
        day_number(simulation.first_dt) * MS_PER_DAY
        + rng.integers(0, simulation.days, pages) * MS_PER_DAY
        + hour * 3_600_000
        + rng.integers(0, 3_600_000, pages)
    )
    return user, page_time[np.lexsort((page_time, page_user))][page]


def _shown(simulation: Simulation, popularity: np.ndarray, user: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the item of every exposure; some are the user's last one once more."""
    item = rng.choice(simulation.items, len(user), p=popularity)
    repeats = np.flatnonzero(rng.random(len(user)) < SHARE_REPEATS)
    repeats = repeats[(repeats > 0) & (user[repeats] == user[repeats - 1])]
    item[repeats] = item[repeats - 1]
    return item


def _log_columns(shown: _Shown, items: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the published columns: clicks, what follows from a click, and what a server writes down."""
    total, time_ms, duration = len(shown.user), shown.time_ms, items["duration_ms"][shown.item]
    click = rng.random(total) < shown.probability
    ratio = np.where(click, rng.gamma(4, 0.3, total), rng.gamma(1.2, 0.12, total))
    play = (ratio * np.where(duration > 0, duration, 5_000)).astype(np.int64)
    long_view = click & (play >= np.minimum(18_000, np.where(duration > 0, duration, 18_000)))
    rare = lambda share: click & (rng.random(total) < share)  # noqa: E731
    profile = rare(0.02)
    local_ms = time_ms + SHANGHAI_OFFSET_MS
    # The server logs late: for 18 % of the rows one hour after the event.
    logged_ms = local_ms + np.where(rng.random(total) < 0.18, 3_600_000, 0)
    logged_day = logged_ms // MS_PER_DAY
    days, inverse = np.unique(logged_day, return_inverse=True)
    return {
        "user_id": shown.user,
        "video_id": shown.item,
        "date": np.array([int(dt_of_day_number(int(d)).replace("-", "")) for d in days])[inverse],
        "hourmin": logged_ms % MS_PER_DAY // 3_600_000 * 100,
        "time_ms": time_ms,
        "is_click": click.astype(np.int64),
        "is_like": rare(0.05).astype(np.int64),
        "is_follow": rare(0.004).astype(np.int64),
        "is_comment": rare(0.01).astype(np.int64),
        "is_forward": rare(0.004).astype(np.int64),
        "is_hate": (~click & (rng.random(total) < 0.002)).astype(np.int64),
        "long_view": long_view.astype(np.int64),
        "play_time_ms": play,
        "duration_ms": duration,
        "profile_stay_time": np.where(profile, rng.integers(500, 20_000, total), 0),
        "comment_stay_time": np.where(rare(0.03), rng.integers(500, 30_000, total), 0),
        "is_profile_enter": profile.astype(np.int64),
        "is_rand": np.zeros(total, np.int64),
        "tab": rng.choice([1, 0, 4, 2, 6], total, p=(0.67, 0.2, 0.08, 0.03, 0.02)),
    }


def _tastes(simulation: Simulation, rng: np.random.Generator) -> np.ndarray:
    """Return the users' tastes on each day, float64 [days, users, topics]; of one day where they last."""
    taste = rng.normal(0, simulation.taste_sd, (simulation.users, simulation.topics))
    if not simulation.taste_days:
        return taste[None]
    by_day = [taste]
    for _ in range(1, simulation.days):
        anew = rng.random(taste.shape) < -np.expm1(-1 / simulation.taste_days)
        by_day.append(np.where(anew, rng.normal(0, simulation.taste_sd, taste.shape), by_day[-1]))
    return np.stack(by_day)


def _hour_profile() -> np.ndarray:
    shape = 1.2 + np.cos((np.arange(24) - 12) / 24 * 2 * np.pi)  # UTC noon = evening in Shanghai
    return shape / shape.sum()


def _best_by_day(shown: _Shown, click: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
    best_auc, best_gauc = {}, {}
    order = np.argsort(shown.user, kind="stable")
    user, probability, click = shown.user[order], shown.probability[order], click[order]
    day = shown.time_ms[order] // MS_PER_DAY
    for number in np.unique(day):
        of_day = day == number
        dt = dt_of_day_number(int(number))
        best_auc[dt] = round(_auc(click[of_day], probability[of_day]), 5)
        owner, labels, scores = user[of_day], click[of_day], probability[of_day]
        cuts = np.flatnonzero(np.diff(owner)) + 1
        parts = [
            (y, s) for y, s in zip(np.split(labels, cuts), np.split(scores, cuts), strict=True) if 0 < y.sum() < len(y)
        ]
        weight = sum(len(y) for y, _ in parts)
        best_gauc[dt] = round(sum(len(y) * _auc(y, s) for y, s in parts) / weight, 5) if weight else float("nan")
    return best_auc, best_gauc


def _auc(label: np.ndarray, score: np.ndarray) -> float:
    """Rank AUC; scores are continuous here, so ties do not matter."""
    positives = int(label.sum())
    if positives in (0, len(label)):
        return float("nan")
    rank = np.empty(len(score))
    rank[np.argsort(score, kind="stable")] = np.arange(1, len(score) + 1)
    return float(
        (rank[label.astype(bool)].sum() - positives * (positives + 1) / 2) / (positives * (len(label) - positives))
    )


def _write_items(items: dict[str, np.ndarray], simulation: Simulation, folder: Path, rng: np.random.Generator) -> None:
    n = simulation.items
    second = rng.integers(0, simulation.topics, n)
    tags = np.char.add(
        items["topic"].astype(str), np.where(rng.random(n) < 0.15, np.char.add(",", second.astype(str)), "")
    )
    # Unlike a taste, a tag can be missing in the item file, as in the published one.
    known = rng.random(n) >= 0.005
    no_null = lambda values, share: pa.array(values.astype(float), mask=rng.random(n) < share)  # noqa: E731
    table = pa.table(
        {
            "video_id": np.arange(n),
            "author_id": items["author_id"],
            "video_type": np.where(rng.random(n) < 0.98, "NORMAL", "AD"),
            "upload_dt": np.full(n, simulation.first_dt),
            "upload_type": rng.choice(["LongImport", "ShortImport", "Kmovie", "Web"], n),
            "visible_status": no_null(np.zeros(n), 0.01),
            "video_duration": pa.array(items["duration_ms"].astype(float), mask=items["duration_ms"] == 0),
            "server_width": no_null(np.full(n, 720), 0.01),
            "server_height": no_null(np.full(n, 1280), 0.01),
            "music_id": rng.integers(0, 9_500_000_000, n),
            "music_type": no_null(np.full(n, 9), 0.05),
            "tag": pa.array(tags.astype(object), pa.string(), mask=~known),
        }
    )
    _write_csv(table, folder / "video_features_basic_sim.csv")


def _write_users(simulation: Simulation, folder: Path, rng: np.random.Generator) -> None:
    n = simulation.users
    ranges = np.array(["0", "(0,10]", "(10,50]", "(50,100]", "(100,150]", "(150,250]", "(250,500]", "500+"])
    onehot_sizes = (2, 7, 50, 1471, 15, 34, 3, 118, 454, 7, 5, 5, 2, 2, 2, 2, 2, 2)
    columns: dict[str, object] = {
        "user_id": np.arange(n),
        "user_active_degree": rng.choice(
            ["full_active", "high_active", "middle_active", "UNKNOWN"], n, p=(0.7, 0.2, 0.08, 0.02)
        ),
        "is_lowactive_period": np.zeros(n, np.int64),
        "is_live_streamer": rng.choice([1, -124], n, p=(0.23, 0.77)),
        "is_video_author": rng.integers(0, 2, n),
    }
    for name in ("follow_user_num", "fans_user_num", "friend_user_num"):
        columns[name] = rng.integers(0, 900, n)
        columns[f"{name}_range"] = rng.choice(ranges, n)
    columns["register_days"] = rng.integers(8, 2_000, n)
    columns["register_days_range"] = rng.choice(
        ["8-14", "15-30", "31-60", "61-90", "91-180", "181-365", "366-730", "730+"], n
    )
    for index, size in enumerate(onehot_sizes):
        values = rng.integers(0, size, n)
        columns[f"onehot_feat{index}"] = (
            pa.array(values.astype(float), mask=rng.random(n) < 0.03) if index in (4, *range(12, 18)) else values
        )
    _write_csv(pa.table(columns), folder / "user_features_sim.csv")


def _write_csv(table: pa.Table, path: Path) -> None:
    """Write with a bare header line, as the published files have it."""
    with path.open("wb") as stream:
        stream.write((",".join(table.column_names) + "\n").encode())
        pacsv.write_csv(table, stream, pacsv.WriteOptions(include_header=False, quoting_style="needed"))


def _short(dt: str) -> str:
    _, month, day = dt.split("-")
    return f"{int(month)}_{day}"


if __name__ == "__main__":
    run_stage(main)
