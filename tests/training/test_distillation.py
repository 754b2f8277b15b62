from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from csrm.config import InputSpec
from csrm.labels import BINARY_LABELS
from csrm.training.data import Fold, JudgedInputs, JudgedPairs
from csrm.training.distillation import Distillation, best_round, label_issues, self_distill
from csrm.training.stage import one_hot_targets

KEY = ["market", "query_id", "product_id"]
TRUTH = {"p0": "yes", "p1": "no", "p2": "yes", "p3": "no"}


@pytest.fixture
def judgments() -> pd.DataFrame:
    """30 queries; one label in ten is wrong."""
    rows = [("kr", f"q{query}", product) for query in range(30) for product in TRUTH]
    frame = pd.DataFrame(rows, columns=KEY)
    frame["true"] = frame["product_id"].map(TRUTH)
    wrong = np.random.default_rng(0).random(len(frame)) < 0.1
    frame["grade"] = np.where(wrong, frame["true"].map({"yes": "no", "no": "yes"}), frame["true"])
    return frame


@pytest.fixture
def inputs(judgments: pd.DataFrame, tmp_path: Path) -> JudgedInputs:
    tables = {
        "catalog": pd.DataFrame({"market": "kr", "product_id": list(TRUTH), "title": list(TRUTH)}),
        "queries": judgments[["market", "query_id"]].drop_duplicates().assign(query=lambda rows: rows["query_id"]),
        "judgments": judgments.drop(columns="true"),
    }
    specs = {}
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        specs[name] = InputSpec(path=str(tmp_path / f"{name}.parquet"), format="parquet")
    return JudgedInputs(**specs)


class Believer:
    """A model of the world in which the majority of a product's labels is right; remembers what it was trained on."""

    def __init__(self, groups: pd.DataFrame, targets: np.ndarray) -> None:
        self.queries = set(groups["query_id"])
        self.share_of_yes = pd.Series(targets[:, 1]).groupby(groups["product_id"].to_numpy()).mean()

    def logits(self, pairs: pd.DataFrame) -> np.ndarray:
        yes = self.share_of_yes[pairs["product_id"]].to_numpy()
        return np.log(np.stack([1 - yes, yes], axis=1) + 1e-6)


def targets_of(grades: pd.Series) -> np.ndarray:
    return one_hot_targets(grades, BINARY_LABELS, None)


Run = Callable[[list[float]], tuple[list, dict[str, Believer], list[tuple[str, Path | None, Fold | None]]]]


@pytest.fixture
def run(inputs: JudgedInputs, tmp_path: Path) -> Run:
    """Distill with given dev metrics: the rounds, the models by name, and the calls that trained them."""

    def distill(dev_metrics: list[float]) -> tuple:
        models, calls, metrics = {}, [], iter(dev_metrics)
        with JudgedPairs(inputs, {"kr": "ko"}) as pairs:

            def train(output_dir: Path, soft_labels: Path | None, without: Fold | None) -> Believer:
                groups = pd.concat(pairs.groups("train", 8, 0, without=without, soft_labels=soft_labels))
                given = targets_of(groups["grade"])
                targets = np.array([g if s is None else s for g, s in zip(given, groups["soft_label"], strict=True)])
                calls.append((output_dir.name, soft_labels, without))
                models[output_dir.name] = Believer(groups, targets)
                return models[output_dir.name]

            settings = Distillation(rounds=3, num_folds=3, teacher_share=0.8)
            rounds = self_distill(pairs, settings, train, targets_of, lambda _: next(metrics), tmp_path)
        return rounds, models, calls

    return distill


def test_no_teacher_saw_the_queries_that_it_judges(run: Run, inputs: JudgedInputs) -> None:
    _, models, calls = run([0.1, 0.2, 0.15])
    with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
        folds = [set(pd.concat(pairs.batches("train", Fold(number, 3)))["query_id"]) for number in range(3)]
    assert set.union(*folds) == models["round-0"].queries
    assert sum(map(len, folds)) == 30
    for number, fold in enumerate(folds):
        assert models[f"round-1-teacher-{number}"].queries == models["round-0"].queries - fold
    assert [name for name, _, _ in calls] == [
        "round-0",
        *(f"round-1-teacher-{number}" for number in range(3)),
        "round-1",
        *(f"round-2-teacher-{number}" for number in range(3)),
        "round-2",
    ]


def test_rounds_stop_when_dev_stops_gaining_and_the_best_is_kept(run: Run) -> None:
    rounds, _, _ = run([0.5, 0.7, 0.7])
    assert [(one.round_index, one.dev_metric) for one in rounds] == [(0, 0.5), (1, 0.7), (2, 0.7)]
    assert best_round(rounds).round_index == 1
    worse, _, _ = run([0.5, 0.4])
    assert best_round(worse).round_index == 0


def test_soft_labels_mix_what_is_given_with_what_the_teachers_think(run: Run, judgments: pd.DataFrame) -> None:
    rounds, _, _ = run([0.1, 0.0])
    table = pq.read_table(rounds[1].soft_labels).to_pandas().merge(judgments.drop(columns="grade"), on=KEY)
    assert len(table) == 120
    given, teacher, soft = (np.stack(table[name]) for name in ("given", "teacher", "soft_label"))
    np.testing.assert_allclose(soft, 0.2 * given + 0.8 * teacher, atol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    is_wrong = (table["grade"] != table["true"]).to_numpy()
    is_flipped = soft.argmax(1) != given.argmax(1)
    np.testing.assert_array_equal(is_flipped, is_wrong)
    assert rounds[1].flipped_share == pytest.approx(is_wrong.mean())


def test_issues_are_the_wrong_labels_the_clearest_first(
    run: Run, inputs: JudgedInputs, judgments: pd.DataFrame
) -> None:
    rounds, _, _ = run([0.1, 0.0])
    issues = label_issues(rounds[1].soft_labels, ["no", "yes"])
    wrong = judgments[judgments["grade"] != judgments["true"]]
    assert set(map(tuple, issues[KEY].to_numpy())) == set(map(tuple, wrong[KEY].to_numpy()))
    assert (issues["suggested_label"] == issues["product_id"].map(TRUTH)).all()
    assert issues["given_probability"].is_monotonic_increasing
    with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
        told = pairs.with_texts(issues)
    assert told["query"].tolist() == issues["query_id"].tolist()
    assert told["title"].tolist() == issues["product_id"].tolist()
