import numpy as np
import pandas as pd
import pytest

from csrm.labels import BINARY_LABELS
from csrm.packing import PackBatch
from csrm.scoring import PairScorer
from csrm.tokenization import Budgets
from tests.test_tokenization import golden_tokenizer


def length_scorer(batch: PackBatch) -> np.ndarray:
    """Logit of yes: a hundredth of the number of the pair's own tokens."""
    lengths = np.take_along_axis(batch.position_ids, batch.last_index, axis=1) + 1
    return np.stack([np.zeros_like(lengths), lengths], axis=-1) / 100.0


def scorer(pack_tokens: int = 512) -> PairScorer:
    return PairScorer(golden_tokenizer(), BINARY_LABELS, length_scorer, pack_tokens)


def test_each_pair_gets_its_own_answer(pairs_pdf: pd.DataFrame) -> None:
    tokenizer = golden_tokenizer()
    scores = scorer().score(pairs_pdf)
    assert scores["relevance_score"].dtype == np.float32
    assert scores.index.equals(pairs_pdf.index)
    for row in (0, 7, 29):
        pair = pairs_pdf.iloc[[row]]
        alone = scorer().score(pair)["relevance_score"].iloc[0]
        assert scores["relevance_score"].iloc[row] == pytest.approx(alone, abs=1e-7)
    assert scores["relevance_score"].nunique() > 10
    assert tokenizer.budgets == Budgets()


def test_prefixes_are_counted_once_per_pack(pairs_pdf: pd.DataFrame) -> None:
    one_query = pairs_pdf.iloc[:5]
    alone, together = scorer(), scorer(2000)
    for row in range(5):
        alone.score(one_query.iloc[[row]])
    together.score(one_query)
    from csrm.scoring import pair_groups

    ((prefix_ids, _),) = pair_groups(one_query, golden_tokenizer())[0]
    assert alone.num_tokens - together.num_tokens == 4 * len(prefix_ids)


def test_arrow_forms_of_maps_lists_and_nulls_are_read(pairs_pdf: pd.DataFrame) -> None:
    arrow_like = pairs_pdf.assign(
        attributes=[list(value.items()) if value is not None else None for value in pairs_pdf["attributes"]],
        retrieved_titles=[
            np.array(value, dtype=object) if value is not None else None for value in pairs_pdf["retrieved_titles"]
        ],
        brand=pairs_pdf["brand"].where(pairs_pdf["brand"].notna(), np.nan),
    )
    pd.testing.assert_frame_equal(scorer().score(arrow_like), scorer().score(pairs_pdf))


def test_no_pairs_give_no_scores(pairs_pdf: pd.DataFrame) -> None:
    assert len(scorer().score(pairs_pdf.iloc[:0])) == 0
