"""The model card says what one has to know, within what MLflow keeps."""

from __future__ import annotations

from typing import Any

from etl.datasets.definition import dataset
from evaluation.release.model_card import MOST_CHARACTERS, about_model, model_card

TAGS = {
    "pipeline.partition": "2022-04-21",
    "pipeline.attempt": "kuairand-2022-04-21-8f4ed4e35edb",
    "mlflow.source.git.commit": "0123abcd",
    "git.dirty": "true",
    "config": "default",
    "config_digest": "c0",
    "data.snapshot_digest": "5c5c",
    "airflow.run_url": "http://127.0.0.1:8080/dags/d/runs/r",
}


def evaluation(users: int = 900) -> dict[str, Any]:
    figures = {"auc": 0.71234, "auc_low": 0.7, "auc_high": None, "gauc": 0.65, "logloss": 0.6}
    rows = [
        {"name": name, "users": users, "calibration": {"expected_ratio": 1.01}, **figures}
        for name in ("vql", "mean_pooling")
    ]
    return {
        "dt": "2022-04-21",
        "simulated": False,
        "primary": "vql",
        "models": rows,
        "champion": None,
        "anchor": None,
        "paired": {"vql_minus_mean_pooling": {"auc": {"value": 0.1, "low": 0.08, "high": 0.12}}},
        "exposures": [],
        "slices": [{"low": 1, "high": 1_234, "targets": 5_000, "models": {"vql": figures}}],
    }


def test_it_says_each_bit_and_field_of_a_request_with_the_decision_and_where_the_model_came_from():
    decided = TAGS | {"promotion": "refused", "gate_reason": "log loss .7 is more than", "quality.passed_reason": "why"}
    card = model_card(dataset("kuairand"), {"seed": 7}, evaluation(), decided)
    for words in (
        "**Promotion: refused**: log loss .7 is more than",
        "A person let gates through: why",
        "| vql | 0.7123 | 0.7000 to - | 0.6500 | 0.6000 | 1.010 |",
        "* AUC vql minus mean_pooling: 0.1000 (0.0800 to 0.1200)",
        "| 1 to 1,234 | 5,000 | 0.7123 | 0.6500 | 0.6000 |",
        "1 `is_click` (the label), 2 `long_view`, 4 `is_like`, 8 `is_follow`",
        "0.1, 0.25, 0.5, 0.75, 0.95, 1.25, 2",
        "`tab` as logged",
        "in this order: `user_active_degree`, ",
        "* commit: 0123abcd (and changes)",
        "* configuration: default c0",
        "* seed: 7",
        "* Airflow: [run](http://127.0.0.1:8080/dags/d/runs/r)",
    ):
        assert words in card
    assert "SIMULATED" not in card and "nothing here says anything of others" not in card
    assert "**Promotion: pending**" in model_card(dataset("kuairand"), {"seed": 7}, evaluation(), TAGS)


def test_what_the_data_cannot_say_stands_among_the_limits():
    simulated = evaluation(users=12) | {"simulated": True}
    card = model_card(dataset("kuairand_simulated"), {"seed": 7}, simulated, TAGS)
    assert "No figure says anything about users" in card and card.count("SIMULATED") == 1
    untitled = dataset("kuairand_simulated").model_copy(update={"title": "Shop"})
    for words in (model_card(untitled, {"seed": 7}, simulated, TAGS), about_model(untitled)):
        assert "SIMULATED data: no figure says anything about users" in words and words.count("SIMULATED") == 1
    assert "fewer than 30 users" in card
    assert "negatives are sampled" in model_card(dataset("tmall"), {"seed": 7}, simulated, TAGS)


def test_a_card_says_what_random_traffic_says_where_there_is_some():
    card = model_card(dataset("kuairand"), {"seed": 7}, evaluation(), TAGS)
    assert "exposed" not in card
    own = evaluation()["models"][0] | {"auc": 0.61}
    parts = [{"exposure": "random", "targets": 1_200, "models": {"vql": own}}]
    card = model_card(dataset("kuairand"), {"seed": 7}, evaluation() | {"exposures": parts}, TAGS)
    assert "| random | 1,200 | 0.6100 | 0.7000 to - | 0.6500 | 0.6000 |" in card


def test_a_long_card_is_cut_to_what_a_database_of_mlflow_takes_and_says_so():
    card = model_card(dataset("kuairand"), {"seed": 7}, evaluation(), TAGS | {"gate_reason": "x" * 6_000})
    assert len(card) <= MOST_CHARACTERS and card.endswith("(cut: MLflow keeps 5,000 characters)")
