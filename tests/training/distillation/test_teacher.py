"""A teacher that costs no label: an encoder, a bundle or a table of scores, in a market that nobody judged."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from csrm.bundle.loading import load_scorer
from csrm.config import InputSpec
from csrm.embedding import load_encoder
from csrm.errors import BundleError, InputError
from csrm.scoring.labels import ESCI_LABELS
from csrm.training.data.judged import TAUGHT, JudgedInputs, JudgedPairs
from csrm.training.distillation import teacher as teacher_module
from csrm.training.distillation.teacher import Teacher, teach, text_cosines
from csrm.training.targets import one_hot_targets

KEY = ["market", "query_id", "product_id"]
NUM_QUERIES = 12
PRODUCTS = ["red tent", "blue tent", "gas stove", "mug"]
QUALITY = {"p0": 3.0, "p1": 2.0, "p2": 1.0, "p3": 0.0}
"""What the table of scores is made of."""
GRADES = {"p0": "E", "p1": "S", "p2": "C", "p3": "I"}
TARGETS_OF = partial(one_hot_targets, labels=ESCI_LABELS, grade_labels=None)


def write(folder: Path, **tables: pd.DataFrame) -> dict[str, Any]:
    specs = {}
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
        specs[name] = InputSpec(path=str(folder / f"{name}.parquet"), format="parquet")
    return specs


def all_pairs(market: str) -> pd.DataFrame:
    return pd.DataFrame(
        [(market, f"q{query}", product) for query in range(NUM_QUERIES) for product in GRADES], columns=KEY
    )


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Any]:
    """Korea has judgments, Taiwan none; queries and products have the same ids in both."""
    markets = ["kr", "tw"]
    kr = all_pairs("kr")
    return write(
        tmp_path,
        catalog=pd.DataFrame(
            [(m, p, t) for m in markets for p, t in zip(GRADES, PRODUCTS, strict=True)],
            columns=["market", "product_id", "title"],
        ),
        queries=pd.DataFrame(
            [(m, f"q{n}", f"{PRODUCTS[n % 4]} {n} {m}") for m in markets for n in range(NUM_QUERIES)],
            columns=["market", "query_id", "query"],
        ),
        judgments=kr.assign(grade=kr["product_id"].map(GRADES)),
        candidates=all_pairs("tw"),
    )


@pytest.fixture
def pairs(tables: dict[str, Any]) -> Iterator[JudgedPairs]:
    inputs = JudgedInputs(**{name: tables[name] for name in ("catalog", "queries", "judgments")})
    with JudgedPairs(inputs, {"kr": "ko"}) as opened:
        yield opened


def teacher_of(tables: dict[str, Any], pairs: JudgedPairs, **settings: Any) -> Teacher:
    """A teacher whose pairs are added."""
    inputs = {name: tables[name] for name in ("catalog", "queries", *settings.pop("inputs", ["candidates"]))}
    teacher = Teacher.model_validate({"inputs": inputs, "markets": {"tw": "zh-TW"}, **settings})
    pairs.add_unlabelled(teacher.pair_inputs, teacher.markets, teacher.pairs_per_query, 0, TAUGHT)
    return teacher


def learnt(path: Path) -> pd.DataFrame:
    """What a student learns: key, expected gain, weight."""
    table = pq.read_table(path).to_pandas()
    gains = np.array([label.gain for label in ESCI_LABELS])
    return table.assign(gain=np.stack(table["soft_label"].to_list()) @ gains).sort_values(KEY, ignore_index=True)


def test_scores_of_any_scale_become_probabilities_that_keep_their_order(
    tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path
) -> None:
    both = pd.concat([all_pairs("kr"), all_pairs("tw")])
    noise = np.random.default_rng(0).normal(size=len(both))
    scores = both.assign(score=1e6 + 100 * (both["product_id"].map(QUALITY) + noise))
    tables |= write(tmp_path, scores=scores)
    taught = teach(teacher_of(tables, pairs, inputs=["scores"], weight=0.5), pairs, ESCI_LABELS, TARGETS_OF, tmp_path)
    found = learnt(taught.path)
    assert (taught.num_pairs, taught.num_judged) == (len(found), 48) == (48, 48)
    assert taught.auc is not None
    assert 0.7 < taught.auc < 1
    assert set(found["market"]) == {"tw"}
    assert set(found["weight"]) == {0.5}
    np.testing.assert_allclose(np.stack(found["soft_label"].to_list()).sum(axis=1), 1, atol=1e-6)
    ordered = found.merge(scores, on=KEY)
    for _, of_query in ordered.groupby("query_id"):
        assert np.array_equal(np.argsort(of_query["gain"]), np.argsort(of_query["score"]))
    # a teacher that is sometimes wrong is not believed beyond that: E is given to one pair in four
    assert found["gain"].mean() == pytest.approx((1 + 0.1 + 0.01) / 4, abs=0.05)
    assert found["gain"].max() < 0.99


def test_the_order_of_the_labels_does_not_matter(tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path) -> None:
    both = pd.concat([all_pairs("kr"), all_pairs("tw")])
    tables |= write(tmp_path, scores=both.assign(score=both["product_id"].map(QUALITY) % 3))  # p0 ranks with p3
    teacher = teacher_of(tables, pairs, inputs=["scores"])
    soft = []
    for labels in (ESCI_LABELS, ESCI_LABELS[::-1]):
        taught = teach(teacher, pairs, labels, partial(one_hot_targets, labels=labels, grade_labels=None), tmp_path)
        soft.append(np.stack(pq.read_table(taught.path)["soft_label"].to_pylist()))
    np.testing.assert_allclose(soft[0], soft[1][:, ::-1])


def test_an_encoder_is_asked_once(
    tables: dict[str, Any],
    pairs: JudgedPairs,
    tmp_path: Path,
    tiny_encoder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_module, "FEWEST_JUDGED", 49)  # what random weights think of judged pairs is chance
    caplog.set_level("INFO")
    teacher = teacher_of(tables, pairs, model=str(tiny_encoder))
    first = learnt(teach(teacher, pairs, ESCI_LABELS, TARGETS_OF, tmp_path / "stages").path)
    assert "scores 48 pairs and 48 judged ones" in caplog.text
    caplog.clear()
    again = learnt(teach(teacher, pairs, ESCI_LABELS, TARGETS_OF, tmp_path / "stages").path)
    assert not any("judged ones" in message for message in caplog.messages)
    pd.testing.assert_frame_equal(first, again)
    # by hand: the cosine of each query with each title, in the order of the gains
    encoder = load_encoder(tiny_encoder)
    for query in range(NUM_QUERIES):
        (vector,) = encoder.embed([f"{PRODUCTS[query % 4]} {query} tw"], "query")
        cosines = encoder.embed(PRODUCTS) @ vector
        gains = first[first["query_id"] == f"q{query}"].set_index("product_id")["gain"]
        assert gains[list(GRADES)].argsort().tolist() == cosines.argsort().tolist()


def test_a_cosine_is_that_of_the_pairs_own_texts(tiny_encoder: Path) -> None:
    encoder = load_encoder(tiny_encoder)
    pairs = pd.DataFrame({"query": ["tent", "mug", "tent"], "title": ["a", "b", "b"]}, index=[7, 7, 8])
    queries, titles = encoder.embed(["tent", "mug", "tent"], "query"), encoder.embed(["a", "b", "b"])
    np.testing.assert_allclose(text_cosines(encoder, pairs), (queries * titles).sum(axis=1), atol=1e-6)


def test_a_bundle_teaches_its_relevance_scores(
    tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "FEWEST_JUDGED", 49)  # what this bundle thinks of the judged pairs is chance
    taught = teach(teacher_of(tables, pairs, model=str(tiny_bundle)), pairs, ESCI_LABELS, TARGETS_OF, tmp_path)
    asked = pairs.read(TAUGHT)
    scores = load_scorer(tiny_bundle, "cpu", threads=1).score(asked)["relevance_score"]
    found = learnt(taught.path).merge(asked[KEY].assign(score=scores.to_numpy()), on=KEY)
    assert len(found) == 48
    for _, of_query in found.groupby("query_id"):
        assert np.array_equal(np.argsort(of_query["gain"]), np.argsort(of_query["score"]))


def test_without_scores_of_judged_pairs_the_trust_is_assumed(
    tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tw = all_pairs("tw")
    scores = tw.assign(score=tw["product_id"].map(QUALITY))
    scores["score"] = scores["score"].astype(object)
    scores.loc[scores["query_id"] == "q3", "score"] = [None, float("nan"), float("inf"), 1.0]  # no score, but one
    tables |= write(tmp_path, scores=scores)
    taught = teach(teacher_of(tables, pairs, inputs=["scores"]), pairs, ESCI_LABELS, TARGETS_OF, tmp_path)
    assert (taught.num_judged, taught.auc) == (0, None)
    assert "0 judged pairs of split train have a score, too few" in caplog.text
    assert (
        "teacher.inputs.scores: 3 of 48 pairs to learn have no score that is a number, and are left out" in caplog.text
    )
    found = learnt(taught.path)
    assert len(found) == 45
    shares = np.stack(found["soft_label"].to_list()).mean(axis=0)
    np.testing.assert_allclose(shares, 0.25, atol=1e-4)  # as the Korean labels
    # pairs without a score are not learnt
    groups = pd.concat(pairs.groups(TAUGHT, 8, 0, soft_labels=taught.path))
    assert len(groups) == 45
    assert groups["soft_label"].notna().all()


def test_many_judged_pairs_are_drawn_by_whole_queries(
    tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "NUM_JUDGED", 24)
    both = pd.concat([all_pairs("kr"), all_pairs("tw")])
    tables |= write(tmp_path, scores=both.assign(score=both["product_id"].map(QUALITY)))
    taught = teach(teacher_of(tables, pairs, inputs=["scores"]), pairs, ESCI_LABELS, TARGETS_OF, tmp_path)
    assert 0 < taught.num_judged < 48
    assert taught.num_judged % len(GRADES) == 0


def test_a_model_that_is_none_is_named(tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path) -> None:
    teacher = teacher_of(tables, pairs, model=str(tmp_path / "nowhere"))
    with pytest.raises(BundleError, match="expected the folder of an encoder or a bundle, got no such folder"):
        teach(teacher, pairs, ESCI_LABELS, TARGETS_OF, tmp_path)


def test_distances_are_no_scores(tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path) -> None:
    both = pd.concat([all_pairs("kr"), all_pairs("tw")])
    tables |= write(tmp_path, scores=both.assign(score=-both["product_id"].map(QUALITY)))
    teacher = teacher_of(tables, pairs, inputs=["scores"])
    with pytest.raises(InputError, match=r"do not go with better labels on 48 judged pairs, ROC-AUC 0\.000"):
        teach(teacher, pairs, ESCI_LABELS, TARGETS_OF, tmp_path)


def test_a_table_without_a_number_is_refused(tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path) -> None:
    tables |= write(tmp_path, scores=all_pairs("tw").assign(score=np.nan))
    teacher = teacher_of(tables, pairs, inputs=["scores"])
    with pytest.raises(InputError, match=r"teacher\.inputs\.scores: no pair of markets \['tw'\] has a score that is"):
        teach(teacher, pairs, ESCI_LABELS, TARGETS_OF, tmp_path)


def test_one_score_for_all_pairs_of_a_market_teaches_nothing(
    tables: dict[str, Any], pairs: JudgedPairs, tmp_path: Path
) -> None:
    kr, tw = all_pairs("kr"), all_pairs("tw")
    scores = pd.concat([kr.assign(score=kr["product_id"].map(QUALITY)), tw.assign(score=0.1)])
    tables |= write(tmp_path, scores=scores)
    teacher = teacher_of(tables, pairs, inputs=["scores"])
    with pytest.raises(
        InputError, match=r"expected scores that differ, got one score for all pairs of markets \['tw'\]"
    ):
        teach(teacher, pairs, ESCI_LABELS, TARGETS_OF, tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "x", "inputs": ["scores"]}, "got model 'x' with scores"),
        ({"model": "x", "inputs": ["candidates", "scores"]}, "got model 'x' with candidates and scores"),
        ({"inputs": ["candidates"]}, "got model None with candidates"),
        ({"inputs": []}, "got model None with neither"),
    ],
)
def test_scores_come_from_one_place(settings: dict[str, Any], message: str) -> None:
    inputs = {name: InputSpec(path="x") for name in ("catalog", "queries", *settings["inputs"])}
    with pytest.raises(ValueError, match=message):
        Teacher.model_validate({**settings, "inputs": inputs, "markets": {"tw": "zh-TW"}})
