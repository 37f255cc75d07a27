"""What is done with a published day, decided from lists alone.

Never built from less, and stale for what shapes rows, for nothing else.
"""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from etl.datasets.definition import BUILT_IN, DatasetDefinition, dataset
from etl.datasets.rows_digest import DIGEST_KIND, rows_digest
from etl.ingest.freshness import Action, KnownFile, Published, accepted_days, judged, rows_to_keep
from etl.ingest.raw import RawFile
from etl.stage.errors import StageError
from etl.warehouse.store import DataFile, Manifest

DAY, SAME, OTHER = "2024-03-02", DIGEST_KIND + "a", DIGEST_KIND + "b"


def file_now(name: str, content: int = 0, modified: int = 0, holds: bool = True) -> RawFile:
    return RawFile(f"/raw/{name}", name, 100 + content // 10, modified, *([None] * 4 if holds else ["2024-01-01"] * 4))


def known(name: str, content: int = 0, modified: int = 0, rows: int | None = 5, hashed: bool = True) -> KnownFile:
    return KnownFile(name, 100 + content // 10, modified, f"sha256:{content}" if hashed else "size:100", rows)


def verdict(
    files: list[KnownFile],
    now: list[RawFile],
    contents: dict[str, int] | None = None,
    rows: int = 10,
    definition: str = SAME,
    **how,
) -> tuple[Action, str]:
    same = dict.fromkeys((f.name for f in files), 0)  # a file of a new name has new bytes, where nothing else is said
    found = judged(
        DAY,
        Published(rows, SAME, tuple(files)),
        now,
        definition,
        lambda f: f"sha256:{(same | (contents or {})).get(f.name, f.name)}",
        **how,
    )
    return found.action, found.reason


def test_raw_retention_is_ordinary():
    assert verdict([known("a"), known("b")], [file_now("b")]) == (Action.FRESH, "raw files are gone: a")
    assert verdict([known("a")], []) == (Action.FRESH, "raw files are gone: a")


def test_a_day_whose_files_are_gone_is_never_built_again_unless_the_loss_is_accepted():
    action, reason = verdict([known("a"), known("b")], [file_now("b")], definition=OTHER)
    assert (action, reason) == (Action.STOP, "the definition changed; raw files are gone: a")
    assert verdict([known("a")], [file_now("b")], wanted=True)[0] is Action.STOP
    assert verdict([known("a")], [], definition=OTHER, accept_loss=True)[0] is Action.BUILD


def test_a_file_that_moved_or_was_renamed_is_not_gone():
    for definition, action in ((SAME, Action.FRESH), (OTHER, Action.BUILD)):
        assert (
            verdict(
                [known("a", content=3)], [file_now("archive/a", content=3)], {"archive/a": 3}, definition=definition
            )[0]
            is action
        )
    assert (
        verdict([known("a", content=3)], [file_now("archive/a", content=3)], {"archive/a": 4})[0] is Action.KEEP
    )  # other bytes of the same size
    assert (
        verdict([known("a", content=3, hashed=False)], [file_now("archive/a", content=3)], {"archive/a": 3})[0]
        is Action.KEEP
    )  # nobody knows its bytes


def test_late_rows_of_a_day_that_cannot_be_rebuilt_are_said():
    # One file archived and a late sibling added: the day is not what its inputs say, and must not be built from the
    # sibling alone.
    action, reason = verdict([known("a")], [file_now("late")])
    assert action is Action.KEEP
    assert (
        reason
        == "late rows may have come, but the day can no longer be rebuilt whole (raw files came: late; raw files are"
        " gone: a)"
    )
    assert verdict([known("a"), known("b")], [file_now("b", content=10)])[0] is Action.KEEP


def test_files_that_came_or_changed_make_a_whole_day_stale():
    assert verdict([known("a")], [file_now("a"), file_now("late")]) == (Action.BUILD, "raw files came: late")
    assert verdict([known("a")], [file_now("a", content=10)]) == (Action.BUILD, "raw files changed: a")
    assert verdict([known("a")], [file_now("a", modified=9)], {"a": 1}) == (Action.BUILD, "raw files changed: a")
    assert verdict([known("a")], [file_now("a", holds=False)]) == (
        Action.BUILD,
        "raw files changed: a",
    )  # its name promises other days now
    assert verdict([known("a")], [file_now("a")], definition=OTHER) == (Action.BUILD, "the definition changed")


def test_a_copied_or_moved_file_is_the_same_file():
    assert verdict([known("a")], [file_now("a", modified=9)]) == (Action.FRESH, "unchanged")
    # What is too large to be read twice is known by its size and time alone.
    assert verdict([known("a", hashed=False)], [file_now("a", modified=9)])[0] is Action.BUILD
    asked: list[str] = []
    judged(DAY, Published(1, SAME, (known("a"),)), [file_now("a")], SAME, lambda f: asked.append(f.name) or "")
    assert asked == []


def test_a_file_that_gave_the_day_no_row_takes_none_along():
    assert verdict([known("a"), known("next day", rows=0)], [file_now("a")], definition=OTHER)[0] is Action.BUILD
    assert verdict([known("a", rows=None)], [], definition=OTHER)[0] is Action.STOP  # built before rows were noted
    assert verdict([known("a")], [file_now("b")], rows=0)[0] is Action.BUILD  # an empty day has nothing to lose


def test_a_manifest_of_an_earlier_version_is_built_again_once_and_kept_where_it_cannot_be():
    manifest = Manifest(
        "d",
        "events",
        DAY,
        "a",
        "s",
        "v",
        (DataFile(0, 3, 1, "x", "p"),),
        {},
        {"log a.csv": "sha256:0"},
        {"raw": "/old", "buckets": 2, "definition": "0123456789abcdef", "listing": "log a.csv 100 0\nb.csv 100 7"},
    )
    published = Published.of(manifest)
    assert published == Published(
        3, "", (KnownFile("b.csv", 100, 7, "", None), KnownFile("log a.csv", 100, 0, "sha256:0", None))
    )
    there = [file_now("log a.csv"), file_now("b.csv", modified=7)]
    assert judged(DAY, published, there, SAME, lambda f: "sha256:0").action is Action.BUILD
    assert judged(DAY, published, there[:1], SAME, lambda f: "sha256:0").action is Action.FRESH


@pytest.mark.parametrize(
    "settings",
    [
        {"raw_files": text}
        for text in (
            "",
            "{",
            "[1]",
            "7",
            '{"a.csv": 5}',
            '{"a.csv": [1, 2]}',
            '{"a.csv": ["large", 0, 1]}',
            '{"a.csv": [1, 0, "many"]}',
            '{"a.csv": [1, null, 1]}',
        )
    ]
    + [{"raw_files": ["a.csv"]}, {"raw_files": None}, {"listing": "a.csv"}, {"listing": "a.csv 100 then"}],
    ids=str,
)
def test_raw_files_of_a_wrong_shape_are_one_clear_error(settings):
    manifest = Manifest("shop", "events", DAY, "a", "s", "v", (DataFile(0, 3, 1, "x", "p"),), {}, {}, settings)
    with pytest.raises(
        StageError,
        match=(
            rf"the manifest of shop/events dt={DAY} has the setting {next(iter(settings))} [\s\S]*remedy: copy the"
            r" newest good manifest"
        ),
    ):
        Published.of(manifest)


files = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.sampled_from([0, 1, 10]), st.integers(0, 2), st.booleans()), max_size=6
)


@given(
    before=files,
    now=files,
    rows=st.integers(0, 3),
    changed=st.booleans(),
    wanted=st.booleans(),
    accept=st.booleans(),
    gave=st.sets(st.sampled_from("abcdef")),
)
def test_whatever_comes_and_goes_a_day_is_built_whole_or_not_at_all(before, now, rows, changed, wanted, accept, gave):
    published = [known(name, content, modified, int(name in gave)) for name, (content, modified, _) in before.items()]
    there = [file_now(name, content, modified, holds) for name, (content, modified, holds) in now.items()]
    action, _ = verdict(
        published,
        there,
        {name: content for name, (content, _, _) in now.items()},
        rows,
        OTHER if changed else SAME,
        wanted=wanted,
        accept_loss=accept,
    )
    new = [content for name, (content, _, _) in now.items() if name not in before]
    assume(len(set(new)) == len(new))  # two copies of a file that went: one of them is as new as any other
    gone = [before[name][0] for name in before.keys() & gave if name not in now] if rows else []
    lost = any(content not in new for content in gone)  # else it has another name now
    if lost and not accept:
        assert action is not Action.BUILD
    if accept or not lost:
        assert action in (Action.BUILD, Action.FRESH)
    holding = {name: content for name, (content, _, holds) in now.items() if holds}
    came = any(name not in before and content not in gone for name, content in holding.items())
    # Of a file of the same size and time nobody looks at the bytes.
    other = any(
        before[name][0] != content and (before[name][0] // 10 != content // 10 or before[name][1] != now[name][1])
        for name, content in holding.items()
        if name in before
    )
    differs = changed or came or other or bool((before.keys() & now.keys()) - holding.keys())
    if action is Action.FRESH:
        assert not differs
        assert not wanted
    elif not (wanted or (accept and lost)):
        assert differs


SHOP = {
    "name": "shop",
    "title": "A shop",
    "first_day": "2024-03-01",
    "logs": {
        "files": ["a-*.csv"],
        "columns": {
            "user": "integer",
            "item": "integer",
            "at": "integer",
            "act": {"type": "text", "one_of": ["buy", "view"]},
            "seen": "integer",
        },
    },
    "events": {
        "user": "user",
        "item": "item",
        "time": {"column": "at", "unit": "seconds"},
        "signals": {"buy": {"column": "act", "equals": ["buy", "gift"]}, "long": {"column": "seen", "at_least": 10}},
        "item_fields": {"sort": "act", "length": {"column": "seen", "kind": "number"}},
    },
    "targets": {"label": "buy"},
}
SHOP["logs"]["columns"]["act"]["one_of"] = ["buy", "view", "gift"]  # type: ignore[index]


def shop(path: str = "", value: object = None) -> DatasetDefinition:
    raw = yaml.safe_load(yaml.safe_dump(SHOP, sort_keys=False))
    if path:
        *parents, last = path.split(".")
        place = raw
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return DatasetDefinition.model_validate(raw)


def test_rows_digest_hangs_on_nothing_that_shapes_no_row():
    harmless = {
        "title": "Another",
        "first_day": "2023-01-01",
        "last_day": "2024-05-05",
        "window": {"target_days": 3, "lookback_days": 9},
        "history.max_events": 9,
        "targets": {"label": "long", "min_events": 3},
        "users": [{"files": "u.csv", "key": "u", "fields": {"age": "age"}}],
        "download": {"licence": "MIT", "page": "https://example.org"},
        "logs.files": ["b-*.csv"],
        "logs.expected_refusals": ["missing_value"],
        "logs.days_in_name": {"pattern": r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)"},
        "logs.header": True,
        "logs.encoding": "utf-8",
        "logs.delimiter": ",",
        "logs.repeats": "drop",
        "logs.columns": dict(reversed(SHOP["logs"]["columns"].items())),  # type: ignore[index]
        "logs.columns.act.one_of": ["gift", "buy", "view"],
        "events.signals.buy.equals": ["gift", "buy"],
        "events.time.zone": "UTC",
        "events.item_fields.sort": {"column": "act", "kind": "categories", "split": ";"},
    }
    assert {key for key, value in harmless.items() if rows_digest(shop(key, value)) != rows_digest(shop())} == set()


def test_rows_digest_hangs_on_every_key_that_shapes_rows():
    shaping = {
        "logs.delimiter": ";",
        "logs.quoting": False,
        "logs.repeats": "keep",
        "logs.header": False,
        "logs.columns.more": "text",
        "logs.columns.seen": "decimal",
        "logs.columns.seen.x": None,
        "logs.columns.act.one_of": ["buy", "view", "gift", "look"],
        "events.user": "seen",
        "logs.missing": ["none"],
        "events.time.unit": "milliseconds",
        "events.time.earliest": "2020-01-01",
        "events.signals.long.at_least": 11,
        "events.signals": dict(reversed(SHOP["events"]["signals"].items())),  # type: ignore[index]
        "events.item_fields": dict(reversed(SHOP["events"]["item_fields"].items())),
        "events.item_fields.sort": "at",
        "events.watch_time": "seen",  # type: ignore[index]
    }
    del shaping["logs.columns.seen.x"]
    assert {key for key, value in shaping.items() if rows_digest(shop(key, value)) == rows_digest(shop())} == set()
    # Without a header the order of the columns is that of the cells.
    bare = shop("logs.header", False)
    turned = bare.model_copy(
        update={"logs": bare.logs.model_copy(update={"columns": dict(reversed(bare.logs.columns.items()))})}
    )
    assert rows_digest(turned) != rows_digest(bare)


def test_every_built_in_definition_has_a_digest_of_its_own_rows():
    found = {path.stem: rows_digest(dataset(path.stem)) for path in BUILT_IN.glob("*.yaml")}
    assert all(digest.startswith(DIGEST_KIND) for digest in found.values())
    assert found["kuairand"] == found["kuairand_1k"]  # the files differ, not how they are read


def test_accepted_days():
    assert accepted_days(["2024-02-28..2024-03-01", "2024-05-01"]) == {
        "2024-02-28",
        "2024-02-29",
        "2024-03-01",
        "2024-05-01",
    }
    for wrong in ("all", "2024-02-30", "2024-03-01..soon"):
        with pytest.raises(StageError, match="is not a day"):
            accepted_days([wrong])


def test_rows_to_keep_are_those_that_are_published_unless_their_loss_is_accepted():
    day = Manifest("d", "events", DAY, "a", "s", "v", (DataFile(0, 7, 1, "x", "p"),))
    assert rows_to_keep(day, None) == 0
    assert rows_to_keep(day, day) == 7
    assert rows_to_keep(dataclasses.replace(day, settings={"accepted_loss": "yes"}), day) == 0
