"""What votes beside a bundle's model: words, an encoder, or both, as much as judged pairs say."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest

from csrm.artefacts.manifest import MANIFEST_NAME, write_manifest
from csrm.bundle.card import bundle_card
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.embedding import load_encoder
from csrm.errors import BundleError, ConfigError, DeviceError
from csrm.export.bundle import export_bundle
from csrm.export.ensemble import Ensemble, export_ensemble
from csrm.export.settings import ExportConfig
from csrm.export.vote import VoteSettings, fit_pair_map
from csrm.scoring.explanation import explain
from csrm.scoring.scorer import pair_texts
from csrm.scoring.vote import named_share
from csrm.training.distillation.teacher import text_cosines


@pytest.fixture(scope="module")
def asked_pdf(pairs_pdf: pd.DataFrame) -> pd.DataFrame:
    """Thirty-six queries with five products each, some of which name a word of them."""
    words = ("mouse", "防摔", "운동화", "black", "1600", "登山")
    return pd.concat([pairs_pdf.assign(query=pairs_pdf["query"] + f" {word}") for word in words], ignore_index=True)


def with_vote(bundle: Path, folder: Path, pairs: pd.DataFrame, judged: pd.DataFrame | None, **voters: Any) -> None:
    """Export the bundle again, with a vote."""
    export_ensemble(
        Ensemble(bundles=(str(bundle),)),
        folder,
        pairs=pairs,
        judged=judged,
        precision="fp32",
        device="cpu",
        grade_labels=None,
        vote=VoteSettings(**voters),
    )


def named_shares(pairs: pd.DataFrame) -> np.ndarray:
    return np.array([named_share(query.query, product) for query, product in pair_texts(pairs)])


def judged_by(bundle: Path, pairs: pd.DataFrame, *others: np.ndarray) -> pd.DataFrame:
    """The pairs with labels that follow the place in its query of the bundle's score and of other values."""
    scores = load_scorer(bundle, "cpu", threads=1).score(pairs)["relevance_score"].to_numpy()
    places = sum(pd.Series(values).groupby(pairs["query"]).rank() for values in (scores, *others))
    grades = places.rank(pct=True).map(lambda place: "ICSE"[min(3, int(4 * place))]).to_numpy()
    return pairs.assign(query_id=pairs["query"], product_id=pairs["title"], grade=grades)


def test_words_and_an_encoder_vote_in_the_scores_of_a_bundle(
    tiny_bundle: Path,
    tiny_encoder: Path,
    pairs_pdf: pd.DataFrame,
    asked_pdf: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoder = load_encoder(tiny_encoder)
    judged = judged_by(tiny_bundle, asked_pdf, text_cosines(encoder, asked_pdf), named_shares(asked_pdf))
    cosines, shares = text_cosines(encoder, pairs_pdf), named_shares(pairs_pdf)
    with_vote(tiny_bundle, tmp_path / "all", pairs_pdf, judged, words=True, encoder=str(tiny_encoder))
    bundle = load_bundle(tmp_path / "all")
    vote = bundle.settings.vote
    assert vote is not None
    assert vote.encoder is not None
    assert [*vote.weights] == ["model", "words", "encoder"]
    assert min(vote.weights.values()) > 0
    assert vote.ndcg["together"] > max(vote.ndcg[name] for name in vote.weights)
    assert bundle.settings.report.quality is not None
    assert bundle.settings.report.quality.ndcg == pytest.approx(vote.ndcg["together"], abs=0.03)  # of these weights
    assert bundle.settings.origin == load_bundle(tiny_bundle).settings.origin
    card = bundle_card(bundle)
    assert f"encoder     {vote.encoder.model} ({vote.encoder.digest[:12]})" in card
    assert f"{vote.weights['words']:.2f} of the query's words that the product names" in card

    monkeypatch.setenv("CSRM_CACHE_DIR", str(tmp_path / "cache"))
    scorer = load_scorer(f"file://{tmp_path}/all", "cpu", threads=1, num_golden=None)  # fetched with its encoder
    model = load_scorer(tiny_bundle, "cpu", threads=1)
    alone = model.score(pairs_pdf)["relevance_score"].to_numpy(np.float64)
    weights = vote.weights
    reached = weights["model"] * np.log(alone / (1 - alone)) + weights["words"] * shares + weights["encoder"] * cosines
    at_least = 1 / (1 + np.exp(np.array(vote.thresholds)[:, None] - reached))  # P(C or better), P(S or better), P(E)
    expected = 0.01 * (at_least[0] - at_least[1]) + 0.1 * (at_least[1] - at_least[2]) + at_least[2]
    np.testing.assert_allclose(scorer.score(pairs_pdf)["relevance_score"], expected, atol=1e-5)
    np.testing.assert_allclose(scorer.score_or_reject(pairs_pdf)["relevance_score"], expected, atol=1e-5)
    said = explain(scorer, pairs_pdf.iloc[0].to_dict()).attrs["votes"]
    assert said == pytest.approx({"model": alone[0], "words": shares[0], "encoder": cosines[0]}, abs=1e-5)
    odd = pairs_pdf.assign(title=[7, "a \ud83d", *pairs_pdf["title"][2:-1], None])  # as an input table may hold them
    assert scorer.score(odd)["relevance_score"].isna().tolist() == [False] * 29 + [True]
    hidden = pairs_pdf.assign(title=pairs_pdf["title"].str.replace(" ", "\u200b "))  # what no one sees moves no score
    np.testing.assert_allclose(scorer.score(hidden)["relevance_score"], expected, atol=1e-5)
    assert len(scorer.score_or_reject(pairs_pdf.iloc[:0])) == 0
    assert scorer.votes(pairs_pdf.iloc[:0]).columns.tolist() == ["model", "words", "encoder"]
    scorer.vote = None  # what the golden pairs prove is the model alone
    np.testing.assert_allclose(scorer.score(pairs_pdf)["relevance_score"], alone, atol=1e-5)


def test_words_alone_vote_where_a_trained_model_is_exported(
    tiny_bundle: Path, pairs_pdf: pd.DataFrame, asked_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    judged, model = judged_by(tiny_bundle, asked_pdf, named_shares(asked_pdf)), str(tiny_bundle.with_name("model"))
    found = export_bundle(model, tmp_path / "words", pairs_pdf, judged, vote=VoteSettings(words=True))
    with_vote(tiny_bundle, tmp_path / "again", pairs_pdf, judged, words=True)
    again = load_bundle(tmp_path / "again").settings.vote
    assert found.settings.vote is not None
    assert again is not None
    assert found.settings.vote.weights == pytest.approx(again.weights, rel=1e-4)
    both = [load_scorer(tmp_path / name, "cpu", threads=1).score(pairs_pdf) for name in ("words", "again")]
    pd.testing.assert_frame_equal(both[0], both[1], atol=1e-4)
    assert not (tmp_path / "words" / "encoder").exists()


def test_a_voter_that_does_not_help_is_left_out(
    tiny_bundle: Path, tiny_encoder: Path, pairs_pdf: pd.DataFrame, asked_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    cosines, shares = text_cosines(load_encoder(tiny_encoder), asked_pdf), named_shares(asked_pdf)
    judged = judged_by(tiny_bundle, asked_pdf, cosines, cosines, cosines, -shares)
    with_vote(tiny_bundle, tmp_path / "encoder", pairs_pdf, judged, words=True, encoder=str(tiny_encoder))
    vote = load_bundle(tmp_path / "encoder").settings.vote
    assert vote is not None
    assert [*vote.weights] == ["model", "encoder"]
    assert [*vote.ndcg] == ["model", "encoder", "together"]
    assert vote.golden_words is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda judged: judged[judged["query_id"].isin(judged["query_id"].unique()[:19])], "expected 20 judged quer"),
        (lambda judged: judged.drop_duplicates("query_id"), "with products of several gains, got 0"),
        (lambda judged: judged[judged["grade"] != "I"], "no judged pair has label 'I'"),
        (lambda judged: judged[judged["grade"] != "E"], "no judged pair has label 'E'"),
        (
            lambda judged: judged.assign(grade=judged["grade"].sample(frac=1, random_state=0).to_numpy()),
            "left out: wor",
        ),
    ],
)
def test_where_judged_pairs_choose_nothing_the_model_scores_alone(
    tiny_bundle: Path,
    pairs_pdf: pd.DataFrame,
    asked_pdf: pd.DataFrame,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[pd.DataFrame], pd.DataFrame],
    why: str,
) -> None:
    judged = change(judged_by(tiny_bundle, asked_pdf, named_shares(asked_pdf)))
    with_vote(tiny_bundle, tmp_path / "none", pairs_pdf, judged, words=True)
    assert load_bundle(tmp_path / "none").settings.vote is None
    assert why in caplog.text
    found, alone = (load_scorer(folder, "cpu").score(pairs_pdf) for folder in (tmp_path / "none", tiny_bundle))
    pd.testing.assert_frame_equal(found, alone)


def test_a_csrm_that_cuts_words_otherwise_does_not_load_the_bundle(
    tiny_bundle: Path, pairs_pdf: pd.DataFrame, asked_pdf: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = judged_by(tiny_bundle, asked_pdf, named_shares(asked_pdf))
    with_vote(tiny_bundle, tmp_path / "words", pairs_pdf, judged, words=True)
    monkeypatch.setattr("csrm.bundle.loading.named_share", lambda query, product: 0.25)
    with pytest.raises(BundleError, match=r"its golden products name 0\.\d+ of their queries' words, and 0\.2500 as"):
        load_scorer(tmp_path / "words", "cpu", threads=1)


def test_a_pair_that_the_encoder_fails_on_is_set_aside(
    tiny_bundle: Path, tiny_encoder: Path, pairs_pdf: pd.DataFrame, asked_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    cosines = text_cosines(load_encoder(tiny_encoder), asked_pdf)
    judged = judged_by(tiny_bundle, asked_pdf, cosines, cosines, cosines)
    with_vote(tiny_bundle, tmp_path / "both", pairs_pdf, judged, encoder=str(tiny_encoder))
    scorer = load_scorer(tmp_path / "both", "cpu", threads=1)
    assert scorer.vote is not None
    voters = scorer.vote.voters
    embed, is_broken = voters._embed, False
    assert embed is not None

    def fails(texts: Sequence[str], kind: Literal["query", "passage"]) -> np.ndarray:
        if is_broken or pairs_pdf["title"][4] in texts:
            raise RuntimeError("no")
        return embed(texts, kind)

    voters._embed = fails
    voters.forget()
    found = scorer.score_or_reject(pairs_pdf)
    is_bad = pairs_pdf["title"] == pairs_pdf["title"][4]
    assert found["reason"].eq("model_error").tolist() == is_bad.tolist()
    assert found["relevance_score"].isna().tolist() == is_bad.tolist()

    is_broken = True
    voters.forget()
    with pytest.raises(DeviceError, match=r"the bundle's encoder: a text failed \(no\)"):
        scorer.score_or_reject(pairs_pdf)


def test_a_vote_needs_judged_pairs_and_comes_once(
    tiny_bundle: Path, tiny_encoder: Path, pairs_pdf: pd.DataFrame, asked_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"expected judged pairs that tell how much each voter counts, got none"):
        with_vote(tiny_bundle, tmp_path / "both", pairs_pdf, None, words=True)
    cosines = text_cosines(load_encoder(tiny_encoder), asked_pdf)
    judged = judged_by(tiny_bundle, asked_pdf, cosines, cosines, cosines)
    assert not (tmp_path / "both").exists()
    with_vote(tiny_bundle, tmp_path / "both", pairs_pdf, judged, encoder=str(tiny_encoder))
    with pytest.raises(BundleError, match=r"has a vote already"):
        with_vote(tmp_path / "both", tmp_path / "again", pairs_pdf, judged, encoder=str(tiny_encoder))
    (tmp_path / "both" / "encoder" / "model.onnx").write_bytes(b"another")
    with pytest.raises(BundleError, match=r"encoder/model.onnx has"):
        load_bundle(tmp_path / "both")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {"model": 1.0}}, "expected the model and another voter, got"),
        ({"weights": {"model": 1.0, "encoder": 2.0}}, "expected encoder there where the vote has it"),
        ({"weights": {"model": 1.0, "words": 2.0, "fame": 1.0}}, "fame"),
        ({"weights": {"model": 1.0, "words": -2.0}}, "greater than or equal to 0"),
        ({"thresholds": [0.0]}, "expected 3, got 1"),
    ],
)
def test_a_manifest_whose_vote_does_not_fit_is_refused(
    tiny_bundle: Path,
    pairs_pdf: pd.DataFrame,
    asked_pdf: pd.DataFrame,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    with_vote(
        tiny_bundle,
        tmp_path / "words",
        pairs_pdf,
        judged_by(tiny_bundle, asked_pdf, named_shares(asked_pdf)),
        words=True,
    )
    about = json.loads((tmp_path / "words" / MANIFEST_NAME).read_text())["about"]
    about["vote"] |= changes
    write_manifest(tmp_path / "words", "bundle", about)
    with pytest.raises(BundleError, match=message):
        load_bundle(tmp_path / "words")


def test_a_section_without_a_voter_and_a_bundle_alone_are_refused() -> None:
    with pytest.raises(ValueError, match="expected words: true, the folder of an encoder, or both; got neither"):
        VoteSettings()
    inputs = {name: {"path": name} for name in ("catalog", "queries", "judgments")}
    given: dict[str, Any] = {
        "bundle_dir": "b",
        "markets": {"us": "en"},
        "inputs": inputs,
        "ensemble": {"bundles": ["a"]},
    }
    with pytest.raises(ValueError, match="expected two bundles, or one and a section vote; got one bundle alone"):
        ExportConfig.model_validate(given)
    assert ExportConfig.model_validate(given | {"vote": {"words": True}}).vote == VoteSettings(words=True)


def test_slopes_order_the_products_of_a_query_and_thresholds_give_labels() -> None:
    """The first feature tells queries apart, which orders nothing; the second and the third order products."""
    rng = np.random.default_rng(0)
    queries = np.repeat(np.arange(200), 20)
    of_query, of_pair = rng.normal(size=200)[queries], rng.normal(size=(4_000, 2))
    reached = 3 * of_query + of_pair @ [2.0, 1.0] + rng.logistic(size=4_000)
    given = np.digitize(reached, [-1.0, 1.0])
    gains = np.array([0.0, 0.1, 1.0])[given]
    found = fit_pair_map(np.column_stack([of_query, 5 * of_pair + 7]), gains, queries, given, 3)
    assert found.slopes[0] == 0
    assert found.slopes[1] / found.slopes[2] == pytest.approx(2, rel=0.15)
    shares = found.probabilities(np.column_stack([of_query, 5 * of_pair + 7])).mean(axis=0)
    np.testing.assert_allclose(shares, np.bincount(given) / 4_000, atol=0.01)

    nothing = fit_pair_map(np.ones((20, 2)), np.zeros(20), np.arange(20), np.zeros(20, np.int64), 3)
    assert not nothing.slopes.any()
