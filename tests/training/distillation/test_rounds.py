import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.scoring.labels import BINARY_LABELS
from csrm.training.data.judged import Fold, JudgedInputs, JudgedPairs, UnlabelledInputs
from csrm.training.distillation.rounds import (
    DevMetrics,
    Distillation,
    Round,
    RoundSetup,
    best_round,
    check_folds,
    gain_error,
    self_distill,
)
from csrm.training.distillation.soft_labels import label_issues
from csrm.training.targets import one_hot_targets

KEY = ["market", "query_id", "product_id"]
TRUTH = {"p0": "yes", "p1": "no", "p2": "yes", "p3": "no"}


@pytest.fixture
def judgments() -> pd.DataFrame:
    """30 queries of which one label in ten is wrong, and 5 with right labels in split dev."""
    rows = [("kr", f"q{query}", product) for query in range(35) for product in TRUTH]
    frame = pd.DataFrame(rows, columns=KEY)
    frame["split"] = np.where(frame["query_id"].isin([f"q{query}" for query in range(30, 35)]), "dev", "train")
    frame["true_grade"] = frame["product_id"].map(TRUTH)
    wrong = (np.random.default_rng(0).random(len(frame)) < 0.1) & (frame["split"] == "train")
    frame["grade"] = np.where(wrong, frame["true_grade"].map({"yes": "no", "no": "yes"}), frame["true_grade"])
    return frame


def write_tables(folder: Path, **tables: pd.DataFrame) -> dict[str, InputSpec]:
    specs = {}
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
        specs[name] = InputSpec(path=str(folder / f"{name}.parquet"), format="parquet")
    return specs


@pytest.fixture
def inputs(judgments: pd.DataFrame, tmp_path: Path) -> JudgedInputs:
    queries = judgments[["market", "query_id"]].drop_duplicates().assign(query=lambda rows: rows["query_id"])
    catalog = pd.DataFrame({"market": "kr", "product_id": list(TRUTH), "title": list(TRUTH)})
    return JudgedInputs(**write_tables(tmp_path, catalog=catalog, queries=queries, judgments=judgments))


@pytest.fixture
def unlabelled(tmp_path: Path) -> dict[str, Any]:
    """Settings of 4 pairs of two Taiwanese queries with the titles of the Korean products."""
    folder = tmp_path / "tw"
    folder.mkdir()
    tables = {
        "catalog": pd.DataFrame({"market": "tw", "product_id": ["t0", "t1"], "title": ["p0", "p1"]}),
        "queries": pd.DataFrame({"market": "tw", "query_id": ["a", "b"], "query": ["甲", "乙"]}),
        "candidates": pd.DataFrame([("tw", q, p) for q in "ab" for p in ("t0", "t1")], columns=KEY),
    }
    return {"inputs": UnlabelledInputs(**write_tables(folder, **tables)), "markets": {"tw": "zh-TW"}}


class Believer:
    """A model of the world in which the mean label of a title is right; remembers what it was trained on."""

    digest = ""

    def __init__(self, groups: pd.DataFrame, targets: np.ndarray) -> None:
        self.keys = set(map(tuple, groups[KEY].to_numpy()))
        self.queries = set(groups["query_id"])
        weights = groups["weight"].to_numpy()
        sums = pd.DataFrame({"yes": targets[:, 1] * weights, "all": weights}).groupby(groups["title"].to_numpy()).sum()
        self.share_of_yes = sums["yes"] / sums["all"]

    def logits(self, pairs: pd.DataFrame) -> np.ndarray:
        yes = self.share_of_yes[pairs["title"]].to_numpy()
        return np.log(np.stack([1 - yes, yes], axis=1) + 1e-6)


def targets_of(grades: pd.Series) -> np.ndarray:
    return one_hot_targets(grades, BINARY_LABELS, None)


class Distilled:
    """The rounds, the models by the name of their folder, and the calls that trained them, in order."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self.models: dict[str, Believer] = {}
        self.calls: list[tuple[str, Path | None, Fold | None, float | None]] = []


Run = Callable[..., Distilled]


@pytest.fixture
def run(inputs: JudgedInputs, tmp_path: Path) -> Run:
    """Distill with given dev metrics: of all queries and of two resamples, or one for all; or by agreement."""

    def distill(dev_metrics: list[Any] | None, **settings: Any) -> Distilled:
        done = Distilled()
        metrics = iter([np.broadcast_to(np.array(each, float), 3) for each in dev_metrics or []])
        options = Distillation(**{"rounds": 3, "num_folds": 3, "teacher_share": 0.8, **settings})
        with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
            if options.unlabelled is not None:
                extra = options.unlabelled
                assert pairs.add_unlabelled(extra.inputs, extra.markets, extra.pairs_per_query, 0) == 4

            def train(
                output_dir: Path,
                soft_labels: Path | None = None,
                without: Fold | None = None,
                epochs: float | None = None,
            ) -> Believer:
                done.calls.append((output_dir.name, soft_labels, without, epochs))
                groups = pd.concat(pairs.groups("train", 8, 0, without=without, soft_labels=soft_labels))
                given = targets_of(groups["grade"])
                targets = np.array([g if s is None else s for g, s in zip(given, groups["soft_label"], strict=True)])
                return done.models.setdefault(output_dir.name, Believer(groups, targets))

            def next_metrics(_: Believer) -> DevMetrics:
                return DevMetrics(0.6, next(metrics))

            done.rounds = self_distill(
                RoundSetup(
                    pairs=pairs,
                    settings=options,
                    labels=BINARY_LABELS,
                    train=train,
                    targets_of=targets_of,
                    work_dir=tmp_path,
                    dev_split="dev",
                    dev_metrics=None if dev_metrics is None else next_metrics,
                )
            )
        return done

    return distill


def names(done: Distilled) -> list[str]:
    return [name for name, *_ in done.calls]


def test_no_teacher_saw_the_queries_that_it_judges(run: Run, inputs: JudgedInputs) -> None:
    done = run([0.1, 0.2, 0.15])
    with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
        folds = [set(pd.concat(pairs.batches("train", Fold(number, 3)))["query_id"]) for number in range(3)]
    assert set.union(*folds) == done.models["round-0"].queries
    assert sum(map(len, folds)) == 30
    for number, fold in enumerate(folds):
        assert done.models[f"round-1-teacher-{number}"].queries == done.models["round-0"].queries - fold
    assert names(done) == [
        "round-0",
        *(f"round-1-teacher-{number}" for number in range(3)),
        "round-1",
        *(f"round-2-teacher-{number}" for number in range(3)),
        "round-2",
    ]


def test_rounds_stop_when_dev_stops_gaining_and_the_best_is_kept(run: Run) -> None:
    rounds = run([0.5, 0.7, 0.7]).rounds
    assert [(round_.round_index, round_.dev_auc) for round_ in rounds] == [(0, 0.5), (1, 0.7), (2, 0.7)]
    assert best_round(rounds, 0.0).round_index == 1
    assert best_round(run([0.5, 0.4]).rounds, 0.0).round_index == 0


def test_a_round_that_gains_too_little_is_not_kept(run: Run) -> None:
    rounds = run([0.5, 0.52, 0.9], min_gain=0.03).rounds
    assert len(rounds) == 2
    assert best_round(rounds, 0.03).round_index == 0
    assert best_round(rounds, 0.01).round_index == 1


def test_a_round_that_gains_less_than_its_standard_error_is_not_kept(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        rounds = run([[0.5, 0.48, 0.52], [0.525, 0.475, 0.575]]).rounds
    assert len(rounds) == 2
    assert best_round(rounds, 0.0).round_index == 0
    assert gain_error(rounds[1], rounds[0]) == pytest.approx(0.03)
    assert "gains +0.0250 over round 0, standard error 0.0300" in caplog.text
    # The resamples move together: the gain stands out, though each round's own AUC is not known better.
    assert best_round(run([[0.5, 0.3, 0.7], [0.525, 0.325, 0.725], 0]).rounds, 0.0).round_index == 1


def test_soft_labels_mix_what_is_given_with_what_the_teachers_think(run: Run, judgments: pd.DataFrame) -> None:
    one = run([0.1, 0.0]).rounds[1]
    table = pq.read_table(one.soft_labels).to_pandas().merge(judgments.drop(columns="grade"), on=KEY)
    assert len(table) == 120
    given, teacher, soft = (np.stack(table[name]) for name in ("given", "teacher", "soft_label"))
    np.testing.assert_allclose(soft, 0.2 * given + 0.8 * teacher, atol=1e-6)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    assert (table["weight"] == 1).all()
    is_wrong = (table["grade"] != table["true_grade"]).to_numpy()
    is_flipped = soft.argmax(1) != given.argmax(1)
    np.testing.assert_array_equal(is_flipped, is_wrong)
    assert one.flips.num_flipped == is_wrong.sum() > 5
    assert (one.flips.precision, one.flips.repaired) == (1, 1)
    assert one.doubts.num_flipped == one.flips.num_flipped
    assert one.dev_calibration.num_pairs == 3 * 20
    # The teachers are sure of nine tenths of their answers, and right with as many of the given labels, and all of dev.
    assert one.calibration.expected_error < 0.05
    assert one.dev_calibration.expected_error == pytest.approx(is_wrong.mean(), abs=0.03)


def test_teachers_of_half_a_share_make_labels_softer_but_do_not_outvote_them(run: Run) -> None:
    one = run([0.1, 0.0], teacher_share=0.5).rounds[1]
    assert one.doubts.num_flipped > 5
    assert (one.flips.num_flipped, one.flips.repaired) == (0, 0)


def test_issues_are_the_wrong_labels_the_clearest_first(
    run: Run, inputs: JudgedInputs, judgments: pd.DataFrame
) -> None:
    issues = label_issues(run([0.1, 0.0]).rounds[1].soft_labels, ["no", "yes"])
    wrong = judgments[judgments["grade"] != judgments["true_grade"]]
    assert set(map(tuple, issues[KEY].to_numpy())) == set(map(tuple, wrong[KEY].to_numpy()))
    assert (issues["suggested_label"] == issues["product_id"].map(TRUTH)).all()
    assert issues["given_probability"].is_monotonic_increasing
    with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
        told = pairs.with_texts(issues)
    assert told["query"].tolist() == issues["query_id"].tolist()
    assert told["title"].tolist() == issues["product_id"].tolist()


def test_a_fold_without_queries_is_named(inputs: JudgedInputs) -> None:
    settings = Distillation(num_folds=200)
    with (
        JudgedPairs(inputs, {"kr": "ko"}) as pairs,
        pytest.raises(InputError, match=r"num_folds is 200, but fold \d+ has none of the 30 queries .* lower"),
    ):
        check_folds(settings, pairs, seed=0)


def test_a_dev_split_of_one_kind_of_pairs_cannot_choose(run: Run) -> None:
    with pytest.raises(InputError, match=r"all or no pairs of split 'dev' are of the most relevant"):
        run([float("nan")])


def test_with_one_fold_the_round_before_is_the_teacher(run: Run) -> None:
    done = run([0.1, 0.2, 0.15], num_folds=1)
    assert set(done.models) == {"round-0", "round-1", "round-2"}
    assert all(without is None for _, _, without, _ in done.calls)
    assert pq.read_metadata(done.rounds[2].soft_labels).num_rows == 120
    assert done.rounds[0].agreement is None  # of a teacher that saw what it judges


def test_teachers_stop_early_where_that_is_asked_for(run: Run) -> None:
    done = run([0.1, 0.0], num_folds=1, teacher_epochs=0.5)
    assert [(name, epochs) for name, _, _, epochs in done.calls] == [
        ("round-0", None),
        ("round-1-teacher-0", 0.5),
        ("round-1", None),
    ]


def test_without_a_dev_split_teachers_that_agree_with_unseen_labels_choose_the_round(
    run: Run, judgments: pd.DataFrame
) -> None:
    # A title alone tells the truth, so no round can order better than round 0 but by chance.
    done = run(None, choose_by="agreement", min_gain=0.03)
    assert [round_.round_index for round_ in done.rounds] == [0, 1]
    assert best_round([dataclasses.replace(round_, agreement=0.8) for round_ in done.rounds], 0.03).round_index == 0
    # Teachers of both rounds measured them, and only the round that is kept has a student.
    teachers = [f"round-{index}-teacher-{number}" for index in (1, 2) for number in range(3)]
    assert names(done) == [*teachers, best_round(done.rounds, 0.03).model_dir.name]
    # A positive and a negative label are ordered right where both are right, wrong where both are wrong, and half the
    # time where one is wrong: in all, the share of right labels.
    wrong = (judgments["grade"] != judgments["true_grade"])[judgments["split"] == "train"].mean()
    assert done.rounds[0].agreement == pytest.approx(1 - wrong, abs=0.03)
    assert done.rounds[0].dev_auc is None


def test_rounds_go_on_while_agreement_gains(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gained = iter([0.6, 0.7, 0.65])
    monkeypatch.setattr("csrm.training.distillation.rounds.fold_agreement", lambda *_: np.full(201, next(gained)))
    done = run(None, choose_by="agreement")
    assert [round_.agreement for round_ in done.rounds] == [0.6, 0.7, 0.65]
    assert names(done)[-1] == "round-1"
    assert [round_["agreement"] for round_ in json.loads((tmp_path / "rounds.json").read_text())] == [0.6, 0.7, 0.65]


def test_the_control_has_as_many_flips_on_pairs_that_were_not_chosen(run: Run, tmp_path: Path) -> None:
    done = run([0.1, 0.5, 0.3], rounds=1, control=True)
    assert names(done)[-2:] == ["round-1", "round-1-control"]
    assert (done.rounds[1].dev_auc, done.rounds[1].control_auc) == (0.5, 0.3)
    own, control = (
        pq.read_table(path).to_pandas()
        for path in (done.rounds[1].soft_labels, tmp_path / "round-1-control_labels.parquet")
    )
    pd.testing.assert_frame_equal(own.drop(columns="soft_label"), control.drop(columns="soft_label"))
    transitions = [
        pd.crosstab(rows["grade"], [label.argmax() for label in rows["soft_label"]]).to_numpy()
        for rows in (own, control)
    ]
    np.testing.assert_array_equal(*transitions)
    flipped = [np.stack(rows["soft_label"]).argmax(1) != np.stack(rows["given"]).argmax(1) for rows in (own, control)]
    assert (flipped[0] & flipped[1]).sum() < flipped[0].sum() / 2


def test_unlabelled_pairs_are_learnt_as_the_mean_of_all_teachers(run: Run, unlabelled: dict[str, Any]) -> None:
    done = run([0.1, 0.0], unlabelled={**unlabelled, "weight": 0.5})
    one = done.rounds[1]
    assert one.num_unlabelled == 4
    assert one.flips.num_pairs == 120
    table = pq.read_table(one.soft_labels).to_pandas()
    pseudo = table[table["market"] == "tw"]
    teachers = [done.models[f"round-1-teacher-{number}"] for number in range(3)]
    mean_yes = np.mean([teacher.share_of_yes["p0"] for teacher in teachers])
    for row in pseudo.itertuples():
        wanted = mean_yes if row.product_id == "t0" else np.mean([teacher.share_of_yes["p1"] for teacher in teachers])
        np.testing.assert_allclose(row.soft_label, [1 - wanted, wanted], atol=1e-5)
        assert row.grade is None
    assert pseudo["weight"].between(0.1, 0.5).all()
    assert len(done.models["round-1"].keys) == 124
    assert len(done.models["round-0"].keys) == 120


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"choose_by": "agreement", "num_folds": 1}, "teachers that did not see their fold"),
        ({"choose_by": "agreement", "control": True}, "control is measured on the dev split"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**settings)
