"""The raw reader against DuckDB's CSV reader: what each makes of broken rows, and rows a second.

DuckDB reads the files in two ways. `typed`: its own casts and `store_rejects`, the bounds of the definition in SQL.
`text`: every cell as text, and every rule of the definition as a regular expression or a cast in SQL. The rows are
those of the mutation test, and what is right is what that test's slow reader of one line says. One thread each.

`strict_mode` ends the whole read at the first CRLF among lines that end in LF, so all rows are read without it; the
`tame` ones, without a CR and without a quote more or less, are read with it.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa

from etl.datasets.definition import Column, DatasetDefinition, dataset
from etl.datasets.simulate import Simulation, write_simulation
from etl.ingest.raw import RawLocation
from etl.warehouse.partitions import MS_PER_DAY, day_number
from tests.etl.ingest.test_mutations import FILES, GOOD, ROOT, ROWS, mutated, plainly

TURNS = 3
USERS, LENGTH_SCALE = 370, 0.45  # 2.0 M rows
REJECTS = "rejected"
TYPES = {"integer": "BIGINT", "decimal": "DOUBLE", "text": "VARCHAR"}
PATTERNS = {"integer": r"-?[0-9]+(\.0*)?", "decimal": r"-?[0-9]{1,18}(\.[0-9]{0,30})?([eE][-+]?[0-9]{1,2})?"}
# Which of our reasons says the same as a kind of DuckDB's rejects.
SAME_REASON = {
    "CAST": {"not_an_integer", "not_a_decimal", "too_large"},
    "MISSING COLUMNS": {"wrong_column_count"},
    "TOO MANY COLUMNS": {"wrong_column_count"},
    "UNQUOTED VALUE": {"broken_quotes"},
    "INVALID ENCODING": {"not_utf8"},
}


@dataclass
class Outcome:
    """What a reader made of a file.

    Attributes:
        rows: the values of each row that it let through, in the order of the file.
        refused: (row number, reason); where a row is refused after it was read, DuckDB has no row number: None.
        error: what ended the read before its end.
    """

    rows: list[tuple] = field(default_factory=list)
    refused: list[tuple[int | None, str]] = field(default_factory=list)
    error: str = ""


def ours(folder: Path, definition: DatasetDefinition, each: Callable[[pa.Table, list], None]) -> None:
    """Read the logs of a folder with `etl.ingest.raw`; `each` gets the rows with their times, and the refused ones."""
    place = RawLocation(str(folder))

    def count(ranges: list) -> list[int]:
        return [place.count_newlines(file, start, end) for file, start, end in ranges]

    for split in place.splits(place.logs(definition), definition.logs, count):
        for chunk in place.read(split, definition):
            each(chunk.rows.append_column("time_ms", pa.array(chunk.time_ms)), chunk.refused)


def duck(
    folder: Path, definition: DatasetDefinition, each: Callable[[pa.Table, list], None], as_text: bool, strict: bool
) -> None:
    """Read the logs of a folder with DuckDB; `each` as in `ours`."""
    with duckdb.connect(config={"threads": 1}) as connection:
        for file in RawLocation(str(folder)).logs(definition):
            query = duck_query(file.path, definition, as_text, strict)
            names = [*definition.logs.columns, "time_ms"]
            for batch in connection.execute(query).to_arrow_reader(1 << 18):
                table = pa.Table.from_batches([batch])
                good = table["reason"].is_null()
                bad = [(None, reason) for reason in table["reason"].drop_null().to_pylist()]
                each(table.filter(good).select(names), bad)
            found = connection.execute(
                f"SELECT line, any_value(error_type::VARCHAR) FROM {REJECTS} GROUP BY line ORDER BY line"
            )
            each(table.slice(0, 0).select(names), found.fetchall())


def duck_query(path: str, definition: DatasetDefinition, as_text: bool, strict: bool) -> str:
    """Return the query whose rows have the declared columns, time_ms, a hash and the reason to refuse them, or NULL."""
    logs, clock = definition.logs, definition.events.time
    types = {name: "VARCHAR" if as_text else TYPES[column.type] for name, column in logs.columns.items()}
    mark = "'\"'" if logs.quoting else "''"
    scan = (
        f"read_csv({_text(path)}, auto_detect = false, header = {str(logs.header).lower()}, delim = ',', quote ="
        f" {mark}, escape = {mark}, columns = {json.dumps(types).replace(chr(34), chr(39))}, strict_mode ="
        f" {str(strict).lower()}, store_rejects = true, rejects_table = '{REJECTS}', rejects_scan = '{REJECTS}_scan',"
        f" rejects_limit = 0, nullstr = [{', '.join(map(_text, ('', *logs.missing)))}])"
    )
    wrong = [rule for name, column in logs.columns.items() for rule in _rules(name, column, as_text)]
    cast = {name: _cast(name, column) if as_text else f'"{name}"' for name, column in logs.columns.items()}
    moment = cast[str(clock.column)]
    if clock.unit is not None:
        time_ms = f"TRY({moment} * {1000 if clock.unit == 'seconds' else 1})"
    else:
        four = f"lpad({moment}, greatest(4, length({moment}))::INTEGER, '0')"
        wrong.append((f"NOT regexp_full_match({four}, '[0-9]{{4}}')", "unreadable_time"))
        time_ms = f"epoch_ms(try_strptime('2014' || {four}, '%Y%m%d'))"
    first, last = (day_number(day.isoformat()) * MS_PER_DAY for day in (clock.earliest, clock.latest))
    case = " ".join(f"WHEN {condition} THEN {_text(reason)}" for condition, reason in wrong)
    values = ", ".join(f'{value} AS "{name}"' for name, value in cast.items())
    return (
        f"SELECT *, CASE WHEN reason IS NULL AND NOT coalesce(time_ms >= {first} AND time_ms < {last}, false) "
        f"THEN 'time_out_of_range' ELSE reason END AS reason FROM (SELECT {values}, {time_ms} AS time_ms, "
        f"hash({', '.join(cast.values())}) AS row_hash, CASE {case} END AS reason FROM {scan})"
    ).replace("SELECT *, CASE", "SELECT * EXCLUDE (reason), CASE", 1)


def _rules(name: str, column: Column, as_text: bool) -> list[tuple[str, str]]:
    """Return (condition in SQL, reason) of what makes a cell wrong."""
    cell, value = f'"{name}"', _cast(name, column) if as_text else f'"{name}"'
    rules = [] if column.optional else [(f"{cell} IS NULL", f"missing_value: {name}")]
    if as_text:
        rules.append((f"contains({cell}, chr(0)) OR contains({cell}, chr(13))", "nul_byte"))
        if column.type in PATTERNS:
            rules.append((f"NOT regexp_full_match({cell}, {_text(PATTERNS[column.type])})", f"not_an_integer: {name}"))
            rules.append((f"{cell} IS NOT NULL AND {value} IS NULL", f"too_large: {name}"))
    if column.min is not None:
        rules.append((f"{value} < {column.min}", f"too_small: {name}"))
    if column.max is not None:
        rules.append((f"{value} > {column.max}", f"too_great: {name}"))
    if column.one_of is not None:
        listed = ", ".join(_text(one) if column.type == "text" else str(one) for one in column.one_of)
        rules.append((f"{value} NOT IN ({listed})", f"not_one_of: {name}"))
    return rules


def _cast(name: str, column: Column) -> str:
    if column.type == "integer":
        return f"TRY_CAST(split_part(\"{name}\", '.', 1) AS BIGINT)"
    return f'"{name}"' if column.type == "text" else f'TRY_CAST("{name}" AS DOUBLE)'


def _text(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def readers(strict: bool) -> dict[str, Callable]:
    return {
        "ours": ours,
        "typed": lambda folder, definition, each: duck(folder, definition, each, False, strict),
        "text": lambda folder, definition, each: duck(folder, definition, each, True, strict),
    }


def strictness(name: str, folder: Path, tame: bool) -> dict[str, dict[str, int | str]]:
    """Return, for each reader, what it made of the mutated rows of one layout.

    Args:
        tame: only rows that every reader takes for one line each.
    """
    definition = dataset(name if name != "taobao" else str(ROOT / "docs" / "definitions" / "taobao.yaml"))
    rng = random.Random(f"{name} 1")
    drawn = b"\n".join(mutated(GOOD[name], rng) for _ in range(ROWS)).split(b"\n")
    quotes = GOOD[name].count(b'"')
    body = b"".join(line + b"\n" for line in drawn if not tame or (b"\r" not in line and line.count(b'"') == quotes))
    header = (",".join(definition.logs.columns) + "\n").encode() if definition.logs.header else GOOD[name] + b"\n"
    (folder / FILES[name]).write_bytes(header + body)
    lines = (header + body).replace(b"\r\n", b"\n").split(b"\n")[:-1]
    first = 2 if definition.logs.header else 1
    numbered = [
        (n, plainly(line, definition)) for n, line in enumerate(lines[first - 1 :], first) if line.strip(b" \t\r")
    ]
    good = Counter(tuple(row.values()) for _, row in numbered if row is not None)
    wrong = {number for number, row in numbered if row is None}
    found = {reader: outcome(read, folder, definition) for reader, read in readers(strict=tame).items()}
    reasons = {number: reason.partition(":")[0] for number, reason in found["ours"].refused}
    return {reader: _judged(one, good, wrong, reasons) for reader, one in found.items()}


def outcome(read: Callable, folder: Path, definition: DatasetDefinition) -> Outcome:
    """Read a folder; return its rows and refusals, or the error that ended it."""
    result = Outcome()

    def each(rows: pa.Table, refused: list) -> None:
        result.rows += [tuple(row.values()) for row in rows.to_pylist()]
        result.refused += [one if isinstance(one, tuple) else (one.row_number, one.reason) for one in refused]

    try:
        read(folder, definition, each)
    except duckdb.Error as error:
        result.error = str(error).splitlines()[0][:120]
    return result


def _judged(one: Outcome, good: Counter, wrong: set[int], reasons: dict[int | None, str]) -> dict[str, int | str]:
    rows = Counter(one.rows)
    placed = {number: reason for number, reason in one.refused if number is not None}
    same = [
        n for n in placed.keys() & wrong if reasons.get(n) in SAME_REASON.get(placed[n], {placed[n].partition(":")[0]})
    ]
    return {
        "good": good.total(),
        "to refuse": len(wrong),
        "read rightly": (rows & good).total(),
        "good rows lost": (good - rows).total(),
        "wrong rows let in": (rows - good).total(),
        "refused": len(one.refused),
        "refused with their row number": len(placed.keys() & wrong),
        "and the right reason": len(same),
        "good lines among the rejects": len(placed.keys() - wrong),
        **({"ended by": one.error} if one.error else {}),
    }


def speed(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Return rows a second of wall and of processor time of each reader, alternated, on a plain file and a
    packed one."""
    marker = write_simulation(Simulation(users=USERS, length_scale=LENGTH_SCALE), folder / "sim")
    definition = dataset("kuairand_simulated")
    parts = sorted((folder / "sim").glob("log_*.csv"))
    text = parts[0].read_bytes() + parts[1].read_bytes().partition(b"\n")[2]
    results: dict[str, dict[str, list[float]]] = {}
    for kind in ("plain", "gzip"):
        place = folder / kind
        place.mkdir()
        (place / "SIMULATED.json").write_text("{}")
        name = "log_standard_4_08_to_4_22_sim.csv"
        (place / (name if kind == "plain" else f"{name}.gz")).write_bytes(
            text if kind == "plain" else gzip.compress(text, 6)
        )
        for turn in range(TURNS + 1):
            for reader, read in readers(strict=True).items():
                counted = [0]

                def each(rows: pa.Table, refused: list, counted: list[int] = counted) -> None:
                    counted[0] += len(rows) + len(refused)

                began, cpu = time.perf_counter(), time.process_time()
                read(place, definition, each)
                assert counted[0] == marker["rows"], (reader, counted[0], marker["rows"])
                if turn:  # the first turn warms the page cache
                    took = results.setdefault(kind, {})
                    took.setdefault(reader, []).append(marker["rows"] / (time.perf_counter() - began))
                    took.setdefault(f"{reader} cpu", []).append(marker["rows"] / (time.process_time() - cpu))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["strictness", "speed"])
    args = parser.parse_args()
    pa.set_cpu_count(1)
    with tempfile.TemporaryDirectory() as temporary:
        for tame, name in itertools.product((False, True), GOOD if args.only != "speed" else ()):
            folder = Path(temporary) / f"{name} {tame}"
            folder.mkdir()
            for reader, counts in strictness(name, folder, tame).items():
                shown = ", ".join(
                    f"{what} {count:,}" if what != "ended by" else f"{what} {count}" for what, count in counts.items()
                )
                print(f"{'tame' if tame else 'all':4} {name:8} {reader:5} {shown}", flush=True)
        if args.only == "strictness":
            return
        for kind, measured in speed(Path(temporary)).items():
            for reader in readers(strict=True):
                wall, cpu = measured[reader], measured[f"{reader} cpu"]
                ratios = [ours / other for ours, other in zip(measured["ours cpu"], cpu, strict=True)]
                print(
                    f"{kind:6} {reader:6} {statistics.median(wall):12,.0f} rows/s  {statistics.median(cpu):12,.0f} rows"
                    f" a second of processor time  ours / this {statistics.median(ratios):.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
