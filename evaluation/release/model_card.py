"""The model card of a registered version: what one has to know of it before one asks it or trusts it, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etl.datasets.definition import DatasetDefinition
from etl.warehouse.schemas import WATCH_RATIO_EDGES
from evaluation.figures import cell
from evaluation.log_evaluation import markdown_table
from evaluation.metrics import LEAST_USERS
from evaluation.report import lineage
from training.registry import Registry
from training.tracking import asking_mlflow

MOST_CHARACTERS = 5_000  # of a version's description, in MLflow's own table
MOST_NAMES = 30  # of fields that are listed
CUT = "\n\n(cut: MLflow keeps 5,000 characters)"


def write_card(
    registry: Registry, definition: DatasetDefinition, version: str, training: Mapping, evaluation: Mapping
) -> None:
    """Make the card of a version its description, as its tags are now; the model gets one where it has none."""
    tags = registry.version(version).tags
    with asking_mlflow():
        registry.client.update_model_version(
            registry.name, version, description=model_card(definition, training, evaluation, tags)
        )
        if not registry.client.get_registered_model(registry.name).description:
            registry.client.update_registered_model(registry.name, description=about_model(definition))


def about_model(definition: DatasetDefinition) -> str:
    """Return the description of a registered model, which people may replace."""
    return (
        f"Scores candidates by a user's whole history, on {definition.title}.{_simulated(definition)} A version an"
        " attempt, each with its card as description; `champion` serves, `challenger` asks to, no promotion may fall"
        " behind `anchor`. A person promotes, refuses and rolls back with `make release` or the DAG `vql_release`;"
        " every decision is a tag `release.*` of this page."
    )


def model_card(
    definition: DatasetDefinition, training: Mapping[str, Any], evaluation: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    """Return the card.

    Args:
        training, evaluation: `training.json` and `evaluation.json` of the attempt.
        tags: of the version, with the gate's decision where there is one.
    """
    sections = (
        _decision(definition, evaluation, tags),
        f"### On its day\n\n{markdown_table(evaluation)}\n\n{_comparisons(evaluation)}",
        _slices(evaluation),
        _exposures(evaluation),
        "### Limits\n\n" + "\n".join(f"* {line}" for line in _limits(definition, evaluation)),
        _lineage(training, tags),
        _request(definition),
    )
    card = "\n\n".join(section for section in sections if section)
    return card if len(card) <= MOST_CHARACTERS else card[: MOST_CHARACTERS - len(CUT)] + CUT


def _decision(definition: DatasetDefinition, evaluation: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    decided = tags.get("promotion", "pending")
    reason = f": {tags['gate_reason']}" if "gate_reason" in tags else ""
    passed = (
        f"\n\nA person let gates through: {tags['quality.passed_reason']}" if "quality.passed_reason" in tags else ""
    )
    return (
        f"Scores candidates by a user's whole history, on {definition.title}; trained on the days before"
        f" **{evaluation['dt']}**, judged on that day.{_simulated(definition)}\n\n"
        f"**Promotion: {decided}**{reason}{passed}"
    )


def _simulated(definition: DatasetDefinition) -> str:
    """Return what a simulated data set's figures mean, with the one word SIMULATED that its title may have."""
    if not definition.simulated:
        return ""
    word = "No" if "SIMULATED" in definition.title else "SIMULATED data: no"
    return f" **{word} figure says anything about users.**"


def _comparisons(evaluation: Mapping[str, Any]) -> str:
    found = (
        f"* AUC {name.replace('_minus_', ' minus ')}: {cell(auc['value'])} ({cell(auc['low'])} to {cell(auc['high'])})"
        for name, paired in evaluation["paired"].items()
        for auc in (paired["auc"],)
    )
    return "\n".join(found)


def _slices(evaluation: Mapping[str, Any]) -> str:
    lines = [
        "### By length of the history",
        "",
        "| events | targets | AUC | GAUC | log loss |",
        "|---|---|---|---|---|",
    ]
    for part in evaluation["slices"]:
        own = part["models"][evaluation["primary"]]
        values = " | ".join(cell(own[name]) for name in ("auc", "gauc", "logloss"))
        lines.append(f"| {part['low']:,} to {part['high']:,} | {part['targets']:,} | {values} |")
    return "\n".join(lines)


def _exposures(evaluation: Mapping[str, Any]) -> str:
    if not evaluation["exposures"]:
        return ""
    lines = ["### By what exposed the target", "", "| exposed by | targets | AUC | 95 % | GAUC | log loss |"]
    lines.append("|---|---|---|---|---|---|")
    for part in evaluation["exposures"]:
        own = part["models"][evaluation["primary"]]
        interval = f"{cell(own['auc_low'])} to {cell(own['auc_high'])}"
        values = " | ".join((cell(own["auc"]), interval, cell(own["gauc"]), cell(own["logloss"])))
        lines.append(f"| {part['exposure']} | {part['targets']:,} | {values} |")
    return "\n".join(lines)


def _limits(definition: DatasetDefinition, evaluation: Mapping[str, Any]) -> Iterator[str]:
    history = definition.history
    yield (
        "a target sees what lies before "
        + ("it" if history.cutoff == "event" else "its UTC day")
        + (f", known {history.availability_lag_ms:,} ms later" if history.availability_lag_ms else "")
        + f", the latest {history.max_events:,} events of it"
    )
    yield "intervals are over users of one day; they say nothing of other days, or of seeds"
    if evaluation["models"][0]["users"] < LEAST_USERS:
        yield f"fewer than {LEAST_USERS} users: nothing here says anything of others"
    yield "items that training did not have share a row, and get what unseen values got"
    if definition.targets.negatives is not None:
        yield "negatives are sampled: probabilities are those of the sample, not of exposures"


def _lineage(training: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    rows = lineage(tags) | {"seed": training["seed"]}
    if "Airflow" in rows:
        rows["Airflow"] = f"[run]({rows['Airflow']})"
    if "command" in rows:
        rows["command"] = f"`{rows['command']}`"
    return "### From\n\n" + "\n".join(f"* {name}: {value}" for name, value in rows.items())


def _request(definition: DatasetDefinition) -> str:
    label, bits = definition.targets.label, enumerate(definition.feedback_fields)
    signals = ", ".join(f"{1 << bit} `{name}`" + (" (the label)" if name == label else "") for bit, name in bits)
    edges = ", ".join(f"{edge:g}" for edge in WATCH_RATIO_EDGES)
    context = definition.events.context
    lines = (
        "`history_item_id`, `target_item_id`: raw ids; `history_time_ms`, `target_time_ms`: Unix ms, the first ascend",
        f"`history_feedback`: a sum of {signals}",
        "`history_watch_bucket`: 0 no duration, 1 not watched, else 2 + how many of these watch_time/duration has"
        f" reached: {edges}",
        f"`target_context`: {f'`{context}` as logged' if context else 'none in this data set: 0'}",
        f"`user_fields`: texts, '' unknown, in this order: {_listed(definition.user_fields)}",
        f"items are known by: {_listed(tuple(definition.item_fields))}",
        "answer: `scores`, P(label) of each target",
    )
    return "### The request\n\n" + "\n".join(f"* {line}" for line in lines)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return (", ".join(f"`{name}`" for name in names[:MOST_NAMES]) or "none") + more
