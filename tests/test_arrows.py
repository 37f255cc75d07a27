"""The arrows between the rooms of the code run one way: each room imports what stands below it, and nothing else of
ours.

A room is a folder; this is the one place that says which rooms it may import. Imports inside functions count, too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STAGE, WAREHOUSE, METRICS, DATASETS, INGEST, SEQUENCES, QUALITY, JOBS = (
    f"etl.{room}" for room in ("stage", "warehouse", "metrics", "datasets", "ingest", "sequences", "quality", "jobs")
)
MEASURE, JUDGE, REPORT = (f"{QUALITY}.{room}" for room in ("measure", "judge", "report"))
SHARED = (STAGE, WAREHOUSE, DATASETS)
SETTINGS = "infra.settings"  # what the environment says; it imports etl.stage alone
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    STAGE: (),
    WAREHOUSE: (STAGE,),
    METRICS: (),
    DATASETS: (STAGE, WAREHOUSE, METRICS),  # a definition sets bounds of metrics
    INGEST: SHARED,
    SEQUENCES: (*SHARED, INGEST),
    MEASURE: (*SHARED, METRICS, INGEST, SEQUENCES),
    JUDGE: (*SHARED, METRICS, INGEST, MEASURE),
    REPORT: (*SHARED, METRICS, MEASURE, JUDGE),
    JOBS: (*SHARED, INGEST, SEQUENCES, QUALITY),
    SETTINGS: (STAGE,),
    "infra": (*SHARED, SETTINGS),
    "training": (*SHARED, SETTINGS),
    "evaluation": (*SHARED, SETTINGS, QUALITY, "training"),  # it hands the scores in and asks for the judgement
    # A DAG builds command lines and sees which files came. tests/dags asks what is loaded when its file is read.
    "dags": (
        STAGE,
        DATASETS,
        SETTINGS,
        "infra.options",
        "infra.airflow_api",
        "etl.ingest.raw",
        "evaluation.release.outcomes",
    ),
    "benchmarks": (*SHARED, INGEST, SEQUENCES, QUALITY, JOBS, "training", "evaluation"),
}


def imports_of(source: str) -> set[str]:
    """Return the modules that a source imports anywhere in it.

    `from a import b` counts as a.b, which may be a name of a.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name their module in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def room_of(module: str) -> str:
    """Return the room that a module stands in, the innermost one."""
    return max((room for room in MAY_IMPORT if within(module, room)), key=len, default="")


def against_the_arrow(module: str, source: str) -> list[str]:
    """Return the imports of a module that its room may not have."""
    room = room_of(module)
    ours = {name for name in imports_of(source) if name.split(".")[0] in {room.split(".")[0] for room in MAY_IMPORT}}
    below = MAY_IMPORT[room]
    return sorted(name for name in ours if room_of(name) != room and not any(within(name, other) for other in below))


SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for top in sorted({room.split(".")[0] for room in MAY_IMPORT})
    for path in sorted((ROOT / top).rglob("*.py"))
    if path.name != "__init__.py"
}


def test_every_module_stands_in_a_room_and_imports_downwards_only() -> None:
    assert len(SOURCES) > 90, "the code is not where this test looks"
    assert [module for module in SOURCES if not room_of(module)] == []
    assert {
        module: wrong for module, path in SOURCES.items() if (wrong := against_the_arrow(module, path.read_text()))
    } == {}


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("etl.warehouse.store", "from etl.datasets.definition import dataset"),
        ("etl.ingest.raw", "def late():\n    from etl.quality.judge import audit"),
        ("etl.metrics.record", "from etl.warehouse.schemas import EVENTS"),
        ("etl.quality.measure.partition", "from etl.quality.judge import outcomes"),
        ("etl.quality.judge.audit", "def late():\n    from etl.quality.report import write"),
        ("etl.quality.measure.scores", "import evaluation.evaluate"),
        ("training.loop", "import etl.ingest.raw"),
        ("evaluation.metrics", "from infra.local import services"),
        ("dags._daily", "def late():\n    from training.loop import train_model"),
        ("infra.local.run", "from dags import _daily"),
        ("training.model.ranker", "from benchmarks.claims import variants"),
    ],
)
def test_an_arrow_turned_round_is_seen(module: str, imported: str) -> None:
    assert module in SOURCES
    assert against_the_arrow(module, imported)


def test_one_file_knows_great_expectations() -> None:
    names = {module: imports_of(path.read_text()) for module, path in SOURCES.items()}
    knowing = {module for module, found in names.items() if any(within(name, "great_expectations") for name in found)}
    assert knowing == {"etl.quality.judge.gx"}
