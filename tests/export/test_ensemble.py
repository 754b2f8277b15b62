"""Two bundles that become one: its score is the weighted mean of theirs."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from csrm.artefacts.manifest import MANIFEST_NAME, write_manifest
from csrm.bundle.card import bundle_card
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.errors import BundleError, ConfigError
from csrm.export import graph_files
from csrm.export.bundle import export_bundle
from csrm.export.ensemble import Ensemble, best_share, export_ensemble, join_graphs, mean_logits, seen_by_all
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import PairScorer
from csrm.training.model.base import BaseModel


@pytest.fixture(scope="module")
def other_bundle(
    loud_base_model: Path,
    pairs_pdf: pd.DataFrame,
    train_on: Callable[..., PairScorer],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A bundle of the same base model, trained on other labels."""
    folder = tmp_path_factory.mktemp("other")
    judged = pairs_pdf.assign(grade=["I", "E", "S", "C", "E"] * 6)
    start = BaseModel(folder=str(loud_base_model))
    train_on(judged, start, folder / "model", max_steps=4, learning_rate=1e-3, method="full")
    export_bundle(str(folder / "model"), folder / "bundle", judged)
    return folder / "bundle"


@pytest.fixture(scope="module")
def scores(tiny_bundle: Path, other_bundle: Path, pairs_pdf: pd.DataFrame) -> list[np.ndarray]:
    """Of both bundles."""
    found = [load_scorer(folder, "cpu", threads=1).score(pairs_pdf) for folder in (tiny_bundle, other_bundle)]
    both = [each["relevance_score"].to_numpy(np.float64) for each in found]
    assert np.abs(both[0] - both[1]).max() > 0.01  # they do differ
    return both


def joined(bundles: tuple[Path, ...], folder: Path, pairs: pd.DataFrame, **settings: Any) -> None:
    judged = settings.pop("judged", None)
    ensemble = Ensemble(bundles=tuple(map(str, bundles)), **settings)
    export_ensemble(ensemble, folder, pairs=pairs, judged=judged, precision="fp32", device="cpu", grade_labels=None)


def test_an_ensemble_is_a_bundle_that_scores_as_the_mean_of_its_members(
    tiny_bundle: Path, other_bundle: Path, scores: list[np.ndarray], pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    joined((tiny_bundle, other_bundle), tmp_path / "both", pairs_pdf, weights=(3.0, 1.0))
    found = load_scorer(tmp_path / "both", "cpu", threads=1, num_golden=None).score(pairs_pdf)
    expected = 0.75 * scores[0] + 0.25 * scores[1]
    np.testing.assert_allclose(found["relevance_score"], expected, atol=1e-5)
    bundle = load_bundle(tmp_path / "both")
    digests = [load_bundle(folder).digest for folder in (tiny_bundle, other_bundle)]
    assert bundle.settings.origin.ensemble == {digests[0]: 0.75, digests[1]: 0.25}
    assert f"ensemble: 0.75 of bundle {digests[0][:12]}, 0.25 of bundle {digests[1][:12]}" in bundle_card(bundle)
    assert bundle.digest not in digests
    seen = [load_bundle(folder).seen_tokens() for folder in (tiny_bundle, other_bundle)]
    own = bundle.seen_tokens()
    assert own is not None
    for each in seen:
        assert each is not None
        assert not (own & ~each[: len(own)]).any()  # a night warns of tokens that one member's training never saw
    assert own.any()


def test_what_all_members_saw(tiny_bundle: Path, tmp_path: Path) -> None:
    members = []
    for number, ids in enumerate([[0, 2, 9], [0, 1, 2]]):
        seen = np.zeros(16 if number == 0 else 8, bool)
        seen[ids] = True
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "seen_tokens.bin").write_bytes(np.packbits(seen).tobytes())
        members.append(replace(load_bundle(tiny_bundle), folder=tmp_path / str(number)))
    found = seen_by_all(members)
    assert found is not None
    assert np.flatnonzero(found).tolist() == [0, 2]
    (tmp_path / "1" / "seen_tokens.bin").unlink()  # a bundle of an older version
    assert seen_by_all(members) is None


def test_an_ensemble_does_not_replace_a_member(tiny_bundle: Path, other_bundle: Path, pairs_pdf: pd.DataFrame) -> None:
    before = load_bundle(other_bundle).digest
    with pytest.raises(ConfigError, match=r"expected a folder of its own, got that of a bundle of the ensemble"):
        joined((tiny_bundle, other_bundle), other_bundle.parent / "." / "bundle", pairs_pdf)
    assert load_bundle(other_bundle).digest == before


def test_weights_are_equal_without_judgments_and_an_ensemble_may_be_joined_again(
    tiny_bundle: Path, other_bundle: Path, scores: list[np.ndarray], pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    joined((tiny_bundle, other_bundle), tmp_path / "both", pairs_pdf)
    joined((tmp_path / "both", other_bundle), tmp_path / "all", pairs_pdf, weights=(1, 1))
    found = load_scorer(tmp_path / "all", "cpu", threads=1).score(pairs_pdf)["relevance_score"]
    np.testing.assert_allclose(found, 0.25 * scores[0] + 0.75 * scores[1], atol=1e-5)


def test_judgments_choose_the_weights(
    tiny_bundle: Path, other_bundle: Path, scores: list[np.ndarray], pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    judged = pairs_pdf.assign(query_id=pairs_pdf["query"], product_id=pairs_pdf["title"], grade="I")
    best = pd.Series(scores[1]).groupby(judged["query"].to_numpy()).idxmax()  # as the second bundle ranks them
    judged.loc[best.to_numpy(), "grade"] = "E"
    joined((tiny_bundle, other_bundle), tmp_path / "both", pairs_pdf, judged=judged)
    shares = load_bundle(tmp_path / "both").settings.origin.ensemble
    assert shares is not None
    assert list(shares.values())[1] >= 0.5
    assert load_bundle(tmp_path / "both").settings.report.quality is not None


def test_a_share_is_taken_for_a_gain_that_is_more_than_chance() -> None:
    queries = np.repeat(np.arange(40), 2)
    gains = np.tile([1.0, 0.0], 40)
    right = np.tile([0.6, 0.4], 40)  # by 0.2
    wrong = np.tile([0.2, 0.8], 40)  # by 0.6: from a share of 0.75, the mean is right
    assert best_share(right, wrong, gains, queries) == 0.8
    assert best_share(wrong, right, gains, queries) == 0.2
    assert best_share(right, right, gains, queries) == 0.5
    # right at 0.8 for 11 queries, at a half for 9: the gain of 2 in 20 is less than its error
    mixed = np.concatenate([np.tile([1.0, 0.0], 9), np.tile([0.2, 0.8], 11)])
    first = np.concatenate([np.tile([0.3, 0.7], 9), np.tile([0.6, 0.4], 11)])
    few = slice(0, 40)
    assert best_share(first, mixed, gains[few], queries[few]) == 0.5


def test_graphs_with_weights_beside_them_are_joined(
    tiny_bundle: Path, other_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_files, "_INLINE_BYTES", 0)
    paths = [folder / "model.onnx" for folder in (tiny_bundle, other_bundle, tiny_bundle)]
    (tmp_path / "three").mkdir()
    join_graphs(paths, [0.2, 0.5, 0.3], tmp_path / "three" / "model.onnx")
    assert (tmp_path / "three" / "model.onnx_data").exists()
    join_graphs([tmp_path / "three" / "model.onnx", paths[0]], [0.5, 0.5], tmp_path / "model.onnx")
    scorers = [load_scorer(folder, "cpu", threads=1) for folder in (tiny_bundle, other_bundle)]
    logits = [scorer.logits(pairs_pdf) for scorer in scorers]
    pack_scorer, _ = load_pack_scorer(tmp_path / "model.onnx", "cpu", 1)
    found = PairScorer(scorers[0].tokenizer, scorers[0].labels, pack_scorer=pack_scorer, tokens_per_call=512)
    expected = mean_logits([logits[0], logits[1]], [0.75, 0.25])
    np.testing.assert_allclose(found.logits(pairs_pdf), expected, atol=1e-4)


def test_members_read_the_same_prompts(tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path) -> None:
    other = Path(shutil.copytree("conf/demo_bundle", tmp_path / "other"))
    about = json.loads((other / MANIFEST_NAME).read_text())["about"]
    del about["vote"]
    write_manifest(other, "bundle", about)
    with pytest.raises(BundleError, match=r"other' has another .*tokenizer than .*One graph reads one prompt"):
        joined((tiny_bundle, other), tmp_path / "both", pairs_pdf)
    with pytest.raises(BundleError, match=r"are the same bundle\. Name each once"):
        joined((tiny_bundle, tiny_bundle), tmp_path / "both", pairs_pdf)
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grade_costs": {"I": {"E": 5.0}}}, "has another grade_costs than"),
        ({"precision": "int8"}, r"is int8, expected fp32\. Export it at precision fp32"),
    ],
)
def test_members_are_alike_and_fp32(
    changes: dict[str, Any],
    message: str,
    tiny_bundle: Path,
    other_bundle: Path,
    pairs_pdf: pd.DataFrame,
    tmp_path: Path,
) -> None:
    changed = Path(shutil.copytree(other_bundle, tmp_path / "changed"))
    about = json.loads((changed / MANIFEST_NAME).read_text())["about"] | changes
    (report,) = about["precisions"]
    about["precisions"] = [report | {"precision": about["precision"]}]
    write_manifest(changed, "bundle", about)
    with pytest.raises(BundleError, match=message):
        joined((tiny_bundle, changed), tmp_path / "both", pairs_pdf)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bundles": ["a", "b"], "weights": [1]}, "weights: expected 2, one a bundle, got 1"),
        ({"bundles": ["a", "b"], "weights": [1, 0]}, r"expected numbers above 0, got \[1.0, 0.0\]"),
    ],
)
def test_a_weight_for_each_bundle(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble.model_validate(values)
