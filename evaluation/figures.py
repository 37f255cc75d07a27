"""The figures of an evaluation as its table, its pages and MLflow show them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from training.registry import ANCHOR, CHAMPION


def rows_of(evaluation: Mapping[str, Any]) -> list[dict]:
    """Return the rows of all that was scored: models, champion, and an anchor that is not the champion."""
    others = [evaluation.get(alias) for alias in (CHAMPION, ANCHOR)]
    return [*evaluation["models"], *(row for row in others if row and "auc" in row)]


def cell(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def metrics_of(figures: Mapping[str, float | None], step: int, **linked: str) -> list:
    """Return the figures that are known as MLflow's metrics of now; `linked` says what else they belong to."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [
        Metric(key, value, now, step, **linked)
        for key, value in figures.items()
        if value is not None and math.isfinite(value)
    ]
