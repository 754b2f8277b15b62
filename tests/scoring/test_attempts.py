"""Pairs at which the process dies, found by what earlier attempts have noted."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from csrm.scoring.attempts import Attempts, forget_attempts, open_attempts
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.packing import Pack
from csrm.scoring.scorer import PairScorer, pair_texts
from csrm.scoring.tokenization import PromptTokenizer


class ProcessDied(BaseException):
    """What ends a process: nothing below catches it, and no note is taken back."""


def scorer(tokenizer: PromptTokenizer, deadly: set[int] | None = None) -> PairScorer:
    """Scores by the number of a product's tokens; dies at a product that has a deadly number of them."""

    def score(pack: Pack) -> np.ndarray:
        own = (pack.product_index >= 0).sum(axis=1)
        if not set(own.tolist()).isdisjoint(deadly or ()):
            raise ProcessDied
        logits = np.zeros((len(own), len(ESCI_LABELS)), dtype=np.float32)
        logits[:, 0] = own
        return logits / 20

    return PairScorer(tokenizer, ESCI_LABELS, pack_scorer=score, tokens_per_call=512)


@pytest.fixture
def keyed_pairs(pairs_pdf: pd.DataFrame) -> pd.DataFrame:
    """Pairs of one query and 12 products of different lengths, with keys, on an index of their own."""
    pairs = pd.concat([pairs_pdf.iloc[[0]]] * 12, ignore_index=True)
    pairs["title"] = ["x" + " y" * n for n in range(12)]
    pairs["pair_key"] = np.arange(12, dtype=np.int64) - 2**62
    return pairs.set_index(np.arange(100, 112))


def product_lengths(tokenizer: PromptTokenizer, pairs: pd.DataFrame) -> list[int]:
    """Tokens of each pair's product."""
    return [len(ids) for ids in tokenizer.suffix_ids([product for _, product in pair_texts(pairs)])]


def test_pairs_at_which_the_process_dies_again_and_again_are_set_aside_and_the_others_scored(
    prompt_tokenizer: PromptTokenizer, keyed_pairs: pd.DataFrame, tmp_path: Path
) -> None:
    folder = str(tmp_path / "attempts of 'a run'")
    lengths = product_lengths(prompt_tokenizer, keyed_pairs)
    assert len(set(lengths)) == len(lengths)
    deadly = {lengths[2], lengths[9]}

    for _ in range(3):  # at the step; at one of them alone; at the other one
        with pytest.raises(ProcessDied):
            Attempts(folder).score(scorer(prompt_tokenizer, deadly), keyed_pairs)
    last = Attempts(folder)
    scored = last.score(scorer(prompt_tokenizer, deadly), keyed_pairs)
    last.close()

    expected = scorer(prompt_tokenizer).score_or_reject(keyed_pairs)
    assert scored["reason"].dropna().to_dict() == {102: "process_died", 109: "process_died"}
    assert scored.loc[[102, 109], ["relevance_score", "predicted_grade"]].isna().all(axis=None)
    sound = scored["reason"].isna()
    assert scored.index.equals(keyed_pairs.index)
    pd.testing.assert_frame_equal(scored[sound], expected[sound], check_dtype=False)
    assert scored["relevance_score"].dtype == np.float32

    forget_attempts(folder)
    assert not Path(folder).exists()
    forget_attempts(folder)


def test_what_a_process_noted_that_lived_or_could_not_finish_blames_nobody(
    prompt_tokenizer: PromptTokenizer, keyed_pairs: pd.DataFrame, tmp_path: Path
) -> None:
    alive = Attempts(str(tmp_path))
    alive.score(scorer(prompt_tokenizer), keyed_pairs.iloc[:1])
    assert len(list(tmp_path.iterdir())) == 1
    alive.close()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "torn.json").write_text("[12")

    scored = Attempts(tmp_path.as_uri()).score(scorer(prompt_tokenizer), keyed_pairs)

    assert scored["reason"].isna().all()


def test_a_storage_that_takes_no_notes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert open_attempts("nosuchscheme://bucket/attempts") is None
        forget_attempts("nosuchscheme://bucket/attempts")

    assert "a pair that ends its process every time will not be found: nosuchscheme://bucket" in caplog.text
