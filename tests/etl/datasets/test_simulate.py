"""The simulator: published layout, same seed same bytes, a planted signal of known strength."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pytest

from etl.datasets.definition import SIMULATED_MARKER, dataset
from etl.datasets.simulate import Simulation, exposures, true_probabilities, write_simulation
from etl.stage.errors import StageError
from etl.warehouse.partitions import MS_PER_DAY

KUAIRAND_LOG_COLUMNS = (
    "user_id",
    "video_id",
    "date",
    "hourmin",
    "time_ms",
    "is_click",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
    "long_view",
    "play_time_ms",
    "duration_ms",
    "profile_stay_time",
    "comment_stay_time",
    "is_profile_enter",
    "is_rand",
    "tab",
)
SMALL = Simulation(users=80, days=4, items=300)


def digests(folder) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def logs_of(folder):
    tables = [pacsv.read_csv(path) for path in sorted(folder.glob("log_standard_*.csv"))]
    assert tables
    return tables


def test_the_same_parameters_give_the_same_bytes_and_another_seed_gives_others(tmp_path):
    write_simulation(SMALL, tmp_path / "a")
    write_simulation(SMALL, tmp_path / "b")
    write_simulation(Simulation(users=80, days=4, items=300, seed=8), tmp_path / "c")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


@pytest.mark.parametrize(("taste_days", "rows"), [(0.0, "c7ad8477cc723ea6"), (2.0, "c787f0ce90dcd074")])
def test_the_rows_of_a_simulation_are_those_of_before_random_logs_came_whatever_their_share(tmp_path, taste_days, rows):
    for share in (0.0, 0.3):
        small = Simulation(users=40, days=3, items=200, length_scale=0.01, taste_days=taste_days, random_share=share)
        write_simulation(small, tmp_path / str(share))
        files = [path for path in sorted((tmp_path / str(share)).glob("*.csv")) if "log_random" not in path.name]
        assert hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16] == rows
        assert len(files) == 4 and any((tmp_path / str(share)).glob("log_random_*")) == (share > 0)


def test_logs_that_were_written_before_a_parameter_came_are_not_written_anew(tmp_path):
    marker = write_simulation(SMALL, tmp_path / "raw")
    del marker["parameters"]["random_share"]
    (tmp_path / "raw" / SIMULATED_MARKER).write_text(json.dumps(marker))
    assert write_simulation(SMALL, tmp_path / "raw") == marker
    assert write_simulation(dataclasses.replace(SMALL, random_share=0.1), tmp_path / "raw") != marker


def test_chance_shows_any_item_as_often_on_the_days_of_the_standard_log_and_users_click_as_they_would(tmp_path):
    simulation = dataclasses.replace(SMALL, length_scale=0.1, random_share=0.5)
    marker = write_simulation(simulation, tmp_path / "raw")
    [path] = (tmp_path / "raw").glob("log_random_*.csv")
    by_chance, standard = pacsv.read_csv(path), pa.concat_tables(logs_of(tmp_path / "raw"))
    assert tuple(by_chance.column_names) == KUAIRAND_LOG_COLUMNS
    assert set(by_chance["is_rand"].to_pylist()) == {1} and set(standard["is_rand"].to_pylist()) == {0}
    assert by_chance.num_rows + standard.num_rows == marker["rows"]
    assert by_chance.num_rows / standard.num_rows == pytest.approx(0.5, rel=0.05)
    days = [set((table["time_ms"].to_numpy() // MS_PER_DAY).tolist()) for table in (by_chance, standard)]
    assert days[0] == days[1] and len(days[0]) == 4
    # The standard log shows the most popular tenth of 300 items 40 % of the time, chance shows every tenth alike.
    tenth = [(table["video_id"].to_numpy() < 30).mean() for table in (by_chance, standard)]
    assert tenth[0] == pytest.approx(0.1, abs=0.02) and tenth[1] > 0.35
    of = (by_chance[name].to_numpy() for name in ("user_id", "video_id", "time_ms"))
    probability, click = true_probabilities(tmp_path / "raw", *of), by_chance["is_click"].to_numpy()
    spread = float(np.sqrt((probability * (1 - probability)).sum()))
    assert abs(click.sum() - probability.sum()) < 4 * spread and np.corrcoef(click, probability)[0, 1] > 0.4
    assert len(exposures(simulation)["user_id"]) == marker["rows"] - marker["duplicates"]


def test_layout_and_quirks_are_the_published_ones(tmp_path):
    marker = write_simulation(SMALL, tmp_path / "raw")
    tables = logs_of(tmp_path / "raw")
    assert all(tuple(table.column_names) == KUAIRAND_LOG_COLUMNS for table in tables)
    # The definition reads the published columns in the published order, and fields that the feature files have.
    definition = dataset("kuairand_simulated")
    assert tuple(definition.logs.columns) == KUAIRAND_LOG_COLUMNS
    for rule in (*definition.items, *definition.users):
        [file] = (tmp_path / "raw").glob(rule.files)
        header = file.read_text().splitlines()[0].split(",")
        assert {rule.key, *(field.column for field in rule.fields.values())} <= set(header)
    assert len((tmp_path / "raw" / "user_features_sim.csv").read_text().splitlines()[0].split(",")) == 31
    assert len((tmp_path / "raw" / "video_features_basic_sim.csv").read_text().splitlines()[0].split(",")) == 12
    rows = sum(table.num_rows for table in tables)
    assert rows == marker["rows"]
    time_ms = np.concatenate([table["time_ms"].to_numpy() for table in tables])
    user = np.concatenate([table["user_id"].to_numpy() for table in tables])
    same_page = (np.diff(time_ms) == 0) & (np.diff(user) == 0)
    assert 0.6 < same_page.mean() < 0.95  # 82.8 % in the real logs
    assert 0.1 < np.mean([np.mean(table["duration_ms"].to_numpy() == 0) for table in tables]) < 0.3
    assert set(np.concatenate([table["hourmin"].to_numpy() for table in tables]) % 100) == {0}


def test_the_planted_signal_is_strong_and_its_best_auc_is_stated(tmp_path):
    marker = write_simulation(SMALL, tmp_path / "raw")
    assert all(0.75 < auc < 0.9 for auc in marker["best_auc_by_dt"].values())
    assert json.loads((tmp_path / "raw" / SIMULATED_MARKER).read_text()) == marker


def test_real_logs_are_never_overwritten_and_an_old_simulation_is_replaced(tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    (real / "log_standard_4_08_to_4_21_1k.csv").write_text("precious")
    with pytest.raises(StageError, match="never overwritten"):
        write_simulation(SMALL, real)
    write_simulation(SMALL, tmp_path / "raw")
    assert write_simulation(Simulation(users=20, days=4, items=300), tmp_path / "raw")["parameters"]["users"] == 20


@pytest.mark.parametrize(("first_dt", "days"), [("2023-04-08", 4), ("2021-12-31", 4), ("2022-12-30", 2)])
def test_days_outside_the_year_of_the_file_names_are_refused(tmp_path, first_dt, days):
    with pytest.raises(StageError, match="leave the year 2022"):
        write_simulation(Simulation(users=5, first_dt=first_dt, days=days, items=50), tmp_path / "raw")
    assert not (tmp_path / "raw").exists()


def test_as_many_duplicates_are_planted_as_the_marker_says(tmp_path):
    marker = write_simulation(SMALL, tmp_path / "raw")
    lines = [
        line for path in (tmp_path / "raw").glob("log_standard_*.csv") for line in path.read_text().splitlines()[1:]
    ]
    assert len(lines) - len(set(lines)) == marker["duplicates"] > 0


def test_tastes_that_do_not_last_make_the_distant_past_worth_less(tmp_path):
    def agreement(taste_days: float) -> float:
        """Correlation of users' click rates on a topic between the first and the last days."""
        folder = tmp_path / str(taste_days)
        write_simulation(
            Simulation(users=120, days=10, length_scale=0.2, items=200, topics=5, taste_days=taste_days, seed=3), folder
        )
        log = pa.concat_tables([pacsv.read_csv(path) for path in sorted(folder.glob("log_standard_*.csv"))])
        topic = pacsv.read_csv(folder / "video_features_basic_sim.csv")
        of_item = dict(
            zip(
                topic["video_id"].to_pylist(), [str(tag).split(",")[0] for tag in topic["tag"].to_pylist()], strict=True
            )
        )
        day = (log["time_ms"].to_numpy() - log["time_ms"].to_numpy().min()) // MS_PER_DAY
        cell = np.array(
            [
                (user * 7_919 + int(of_item[item] or 99)) % 100_003
                for user, item in zip(log["user_id"].to_pylist(), log["video_id"].to_pylist(), strict=True)
            ]
        )
        rates = []
        for part in (day < 3, day >= 7):
            clicks = np.bincount(cell[part], log["is_click"].to_numpy()[part], minlength=100_003)
            rates.append((clicks, np.bincount(cell[part], minlength=100_003)))
        enough = (rates[0][1] > 10) & (rates[1][1] > 10)
        return float(np.corrcoef(*(clicks[enough] / seen[enough] for clicks, seen in rates))[0, 1])

    lasting, changing = agreement(0.0), agreement(2.0)
    assert lasting > 0.6 and changing < 0.35, (lasting, changing)
