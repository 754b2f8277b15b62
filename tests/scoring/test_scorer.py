import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from csrm.errors import ConfigError, DeviceError, InputError
from csrm.scoring.labels import BINARY_LABELS
from csrm.scoring.packing import Pack
from csrm.scoring.prompts import Product, Query
from csrm.scoring.scorer import PairScorer, pair_texts, with_pair_columns
from csrm.scoring.tokenization import Budgets
from tests.scoring.test_tokenization import golden_tokenizer


def length_scorer(pack: Pack) -> np.ndarray:
    """Logit of yes: a hundredth of the number of the pair's own tokens."""
    lengths = pack.position_ids[pack.last_index] + 1
    return np.stack([np.zeros_like(lengths), lengths], axis=-1) / 100.0


def scorer(tokens_per_call: int = 512) -> PairScorer:
    return PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=length_scorer, tokens_per_call=tokens_per_call)


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
    from csrm.scoring.scorer import pair_groups

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


MARK = "Ж"
"""A letter that no other text has, so that its tokens are in no other prompt."""


def marked_token() -> int:
    return golden_tokenizer()._encode(MARK)[0]


class FailingScorer:
    """Length scorer that fails on packs with a mark, and counts its calls."""

    def __init__(self, fail: Callable[[Pack, np.ndarray], np.ndarray], marked: int) -> None:
        self.num_calls, self._fail, self._marked = 0, fail, marked

    def __call__(self, pack: Pack) -> np.ndarray:
        self.num_calls += 1
        logits = length_scorer(pack)
        return self._fail(pack, logits) if (pack.input_ids == self._marked).any() else logits


def raise_error(pack: Pack, logits: np.ndarray) -> np.ndarray:
    raise RuntimeError("Non-zero status code returned while running MatMul node")


def give_nan(pack: Pack, logits: np.ndarray) -> np.ndarray:
    return np.full_like(logits, np.nan)


def give_nan_for_one_pair(pack: Pack, logits: np.ndarray) -> np.ndarray:
    found = logits.copy()
    found[0] = np.inf if len(logits) == 1 else np.nan
    return found


def with_marks(pairs: pd.DataFrame, rows: list[int]) -> pd.DataFrame:
    marked = pairs.reset_index(drop=True)
    marked.loc[rows, "title"] = MARK + marked.loc[rows, "title"]
    return marked


@pytest.mark.parametrize(
    ("fail", "reason"),
    [(raise_error, "model_error"), (give_nan, "not_finite"), (give_nan_for_one_pair, "not_finite")],
)
def test_a_pair_that_fails_is_found_by_halving_its_pack(
    pairs_pdf: pd.DataFrame, fail: Callable[[Pack, np.ndarray], np.ndarray], reason: str
) -> None:
    pairs = pd.concat([pairs_pdf.iloc[:5]] * 13, ignore_index=True).iloc[:64]  # one query: one pack
    pairs["title"] = [f"{title} {n}" for n, title in enumerate(pairs["title"])]
    expected = scorer(8_000).score(pairs)
    failing = FailingScorer(fail, marked_token())
    poisoned = PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=failing, tokens_per_call=8_000)
    poisoned.score(pairs_pdf)  # as the golden pairs of a bundle: a pack that is known to be good
    calls_before = failing.num_calls

    scored = poisoned.score_or_reject(with_marks(pairs, [37]))

    assert scored["reason"].dropna().to_dict() == {37: reason}
    assert math.isnan(scored.loc[37, "relevance_score"])
    assert scored.loc[37, "predicted_grade"] is None
    others = scored.index != 37
    np.testing.assert_allclose(scored["relevance_score"][others], expected["relevance_score"][others], atol=1e-7)
    assert failing.num_calls - calls_before <= 1 + 2 * math.log2(64) + 1


def test_a_pair_that_cannot_be_tokenised_is_found_without_more_packs_than_halves(
    pairs_pdf: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = golden_tokenizer()
    suffix_ids = tokenizer.suffix_ids

    def fail(products: list) -> list[list[int]]:
        if any(product.title is not None and MARK in product.title for product in products):
            raise Exception("BPE error: Unk token `<unk>` not found in the vocabulary")
        return suffix_ids(products)

    monkeypatch.setattr(tokenizer, "suffix_ids", fail)
    poisoned = PairScorer(tokenizer, BINARY_LABELS, pack_scorer=length_scorer, tokens_per_call=512)

    scored = poisoned.score_or_reject(with_marks(pairs_pdf, [3, 20]))

    assert scored["reason"].dropna().to_dict() == {3: "tokenizer_error", 20: "tokenizer_error"}
    expected = scorer().score(pairs_pdf.reset_index(drop=True))["relevance_score"].drop([3, 20])
    np.testing.assert_allclose(scored["relevance_score"].drop([3, 20]), expected, atol=1e-7)


def test_every_pair_that_fails_is_rejected_and_none_is_lost(pairs_pdf: pd.DataFrame) -> None:
    poisoned = PairScorer(
        golden_tokenizer(), BINARY_LABELS, pack_scorer=FailingScorer(raise_error, marked_token()), tokens_per_call=512
    )
    poisoned.score(pairs_pdf)

    scored = poisoned.score_or_reject(with_marks(pairs_pdf, list(range(30))))

    assert scored["reason"].tolist() == ["model_error"] * 30


def test_a_pack_without_numbers_is_not_taken_for_a_healthy_one(pairs_pdf: pd.DataFrame) -> None:
    """Before any pack is known to be good, one with a poisoned pair comes first."""
    poisoned = PairScorer(
        golden_tokenizer(), BINARY_LABELS, pack_scorer=FailingScorer(give_nan, marked_token()), tokens_per_call=8_000
    )
    scored = poisoned.score_or_reject(with_marks(pairs_pdf, [17]))
    assert scored["reason"].dropna().to_dict() == {17: "not_finite"}


def test_tokens_of_prompts_are_counted_once_where_packs_are_halved(pairs_pdf: pd.DataFrame) -> None:
    def score(pack: Pack) -> np.ndarray:
        if len(pack.input_ids) > 500:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 17179869184")
        return length_scorer(pack)

    halving = PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=score, tokens_per_call=16_000)
    whole = scorer()
    halving.score_or_reject(pairs_pdf)
    whole.score_or_reject(pairs_pdf)
    assert halving.num_halved_packs > 0
    assert halving.num_prompt_tokens == whole.num_prompt_tokens > whole.num_tokens


@pytest.mark.parametrize("tokens_per_call", [0, -1, 512.0, True, "512", None])
def test_a_call_of_no_whole_number_of_tokens_is_refused(tokens_per_call: object) -> None:
    with pytest.raises(ConfigError, match=r"^tokens_per_call: expected a whole number of tokens from 1, got "):
        scorer(tokens_per_call)  # type: ignore[arg-type]


def test_a_broken_process_rejects_nothing(pairs_pdf: pd.DataFrame) -> None:
    is_broken = False

    def score(pack: Pack) -> np.ndarray:
        nonlocal is_broken
        is_broken = is_broken or bool((pack.input_ids == marked_token()).any())
        if is_broken:
            raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
        return length_scorer(pack)

    poisoned = PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=score, tokens_per_call=512)
    poisoned.score(pairs_pdf)

    with pytest.raises(DeviceError, match=r"CUDA failure 700.*after it pairs fail that were scored before"):
        poisoned.score_or_reject(with_marks(pairs_pdf, [4]))


def test_packs_for_which_memory_does_not_suffice_are_halved_from_then_on(pairs_pdf: pd.DataFrame) -> None:
    sizes: list[int] = []

    def score(pack: Pack) -> np.ndarray:
        sizes.append(len(pack.input_ids))
        if sizes[-1] > 500:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 17179869184")
        return length_scorer(pack)

    pairs = pd.concat([pairs_pdf] * 20, ignore_index=True)
    small = PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=score, tokens_per_call=16_000)
    small.score(pairs_pdf.iloc[:2])

    scored = small.score_or_reject(pairs)
    first_time, sizes[:], num_halved = max(sizes), [], small.num_halved_packs
    again = small.score_or_reject(pairs)

    assert first_time > 4_000
    assert 500 >= max(sizes) > 200
    assert small.num_halved_packs == num_halved > 0
    assert scored["reason"].isna().all()
    expected = scorer().score(pairs)
    np.testing.assert_allclose(scored["relevance_score"], expected["relevance_score"], atol=1e-7)
    np.testing.assert_allclose(again["relevance_score"], expected["relevance_score"], atol=1e-7)


def test_calls_grow_again_when_memory_is_back_and_less_often_where_it_is_not(
    pairs_pdf: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csrm.scoring.scorer.CALLS_TO_GROW", 8)
    sizes: list[int] = []
    limit = 900

    def score(pack: Pack) -> np.ndarray:
        sizes.append(len(pack.input_ids))
        if sizes[-1] > limit:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 17179869184")
        return length_scorer(pack)

    pairs = pd.concat([pairs_pdf] * 20, ignore_index=True)
    shared = PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=score, tokens_per_call=3_200)
    failures = []
    for _ in range(24):
        sizes.clear()
        assert shared.score_or_reject(pairs)["reason"].isna().all()
        failures.append(sum(size > limit for size in sizes))
    assert sum(failures[1:8]) > 0  # it tries again
    assert sum(failures[16:]) < sum(failures[1:8])

    limit = 10_000
    for _ in range(40):
        sizes.clear()
        shared.score_or_reject(pairs)
    assert max(sizes) > 2_000


def test_calls_that_fail_rarely_grow_as_soon_each_time(
    pairs_pdf: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is short once, for one call; then it suffices for long, as beside another job that comes and goes."""
    monkeypatch.setattr("csrm.scoring.scorer.CALLS_TO_GROW", 4)
    sizes: list[int] = []
    is_short = False

    def score(pack: Pack) -> np.ndarray:
        nonlocal is_short
        sizes.append(len(pack.input_ids))
        if is_short:
            is_short = False
            raise RuntimeError("Failed to allocate memory for requested buffer of size 17179869184")
        return length_scorer(pack)

    pairs = pd.concat([pairs_pdf] * 20, ignore_index=True)
    shared = PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=score, tokens_per_call=3_200)
    shared.score_or_reject(pairs)
    largest, waits = max(sizes), []
    for _ in range(5):
        is_short = True
        for wait in range(100):
            sizes.clear()
            shared.score_or_reject(pairs)
            if wait > 0 and max(sizes) == largest:
                break
        waits.append(wait)
        for _ in range(8):
            shared.score_or_reject(pairs)
    assert len(set(waits)) == 1 <= waits[0] <= 5


@pytest.mark.parametrize("tokens_per_call", [1, 400, 2_100, 100_000])
def test_a_call_has_at_most_so_many_tokens_and_the_scores_stay(pairs_pdf: pd.DataFrame, tokens_per_call: int) -> None:
    sizes: list[int] = []

    def score(pack: Pack) -> np.ndarray:
        sizes.append(len(pack.input_ids))
        return length_scorer(pack)

    pairs = pd.concat([pairs_pdf] * 20, ignore_index=True)  # six queries of 100 products

    actual = PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=score, tokens_per_call=tokens_per_call)

    pd.testing.assert_frame_equal(actual.score(pairs), scorer().score(pairs))
    longest = golden_tokenizer().budgets.prompt
    assert max(sizes) <= max(tokens_per_call, longest)
    assert (len(sizes) == 1) == (tokens_per_call == 100_000)


def test_groups_of_one_length_share_a_call(pairs_pdf: pd.DataFrame) -> None:
    """Queries with one product and with forty take turns; sorted, their groups leave few places of an index empty."""
    shares: list[float] = []

    def score(pack: Pack) -> np.ndarray:
        shares.append((pack.group_index >= 0).mean())
        return length_scorer(pack)

    frames = [
        pd.concat([pairs_pdf.iloc[[0]]] * (40 if number % 2 else 1)).assign(query=f"query {number}")
        for number in range(40)
    ]
    PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=score, tokens_per_call=8_000).score(pd.concat(frames))
    assert len(shares) > 2
    assert sorted(shares)[1] > 0.9  # all but the one pack where short groups end and long ones begin


def test_one_long_group_behind_short_ones_does_not_blow_up_their_indexes(pairs_pdf: pd.DataFrame) -> None:
    """Attention holds numbers for each place: one query with 60 products would give 60 with one product as many."""
    packs: list[Pack] = []

    def score(pack: Pack) -> np.ndarray:
        packs.append(pack)
        return length_scorer(pack)

    short = pd.concat([pairs_pdf.iloc[[0]].assign(query=f"query {number}") for number in range(60)])
    pairs = pd.concat([short, pd.concat([pairs_pdf.iloc[[0]]] * 60)], ignore_index=True)
    scored = PairScorer(golden_tokenizer(), BINARY_LABELS, pack_scorer=score, tokens_per_call=16_000).score(pairs)

    assert sum(len(pack.input_ids) for pack in packs) < 16_000  # as one call they would fit
    assert max(pack.group_index.size for pack in packs) <= 32_000
    pd.testing.assert_frame_equal(scored, scorer().score(pairs))


def test_optional_columns_that_are_absent_are_as_if_all_were_null(pairs_pdf: pd.DataFrame) -> None:
    few = pairs_pdf[["title", "query", "language", "market"]]
    bare = pairs_pdf.assign(retrieved_titles=None, brand=None, category=None, attributes=None)

    pd.testing.assert_frame_equal(scorer().score(few), scorer().score(bare))
    pd.testing.assert_frame_equal(scorer().score_or_reject(few), scorer().score_or_reject(bare))
    np.testing.assert_array_equal(scorer().logits(few), scorer().logits(bare))
    assert list(few.columns) == ["title", "query", "language", "market"]


def test_a_frame_with_all_columns_is_not_copied(pairs_pdf: pd.DataFrame) -> None:
    assert with_pair_columns(pairs_pdf) is pairs_pdf


@pytest.mark.parametrize("method", ["score", "score_or_reject", "logits", "prepare"])
def test_a_missing_column_is_named_before_anything_is_scored(pairs_pdf: pd.DataFrame, method: str) -> None:
    with pytest.raises(InputError, match=r"missing columns \['query', 'title'\]; there are \['market', 'language'\]"):
        getattr(scorer(), method)(pairs_pdf[["market", "language"]])


def test_values_convert_as_those_of_input_tables_do() -> None:
    pair = {"market": "us", "language": "en", "query": "tv"}
    rows = [
        {
            **pair,
            "title": 55,
            "brand": 3.0,
            "category": np.int64(7),
            "retrieved_titles": np.array(["a", 8], dtype=object),
        },
        {**pair, "title": "55", "brand": "3", "category": "7", "retrieved_titles": ["a", "8"]},
    ]
    rows[0]["attributes"] = {"n": 1.50, "on": True, "l": ["x", 2], "z": None}
    rows[1]["attributes"] = '{"n": 1.5, "on": true, "l": ["x", 2]}'
    (query, product), other = pair_texts(pd.DataFrame(rows))

    assert (query, product) == other
    assert query == Query("us", "en", "tv", ("a", "8"))
    assert product == Product("55", "3", "7", {"n": "1.5", "on": "true", "l": "x, 2"})


def test_what_pandas_marks_as_missing_is_missing() -> None:
    pair = {"market": "us", "language": "en", "query": "tv", "title": "TV"}
    missing = {"brand": float("nan"), "category": pd.NA, "retrieved_titles": float("nan"), "attributes": float("nan")}

    assert list(pair_texts(pd.DataFrame([pair | missing]))) == [(Query("us", "en", "tv", ()), Product("TV"))]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "retrieved_titles",
            "a title",
            r"row 1, column retrieved_titles: expected a list of text, got str 'a title'\. Put it",
        ),
        ("retrieved_titles", 7, r"expected a list of text, got float 7\.0"),
        ("retrieved_titles", [b"x"], r"expected string, got bytes\. Cast it to text"),
        ("title", True, r"row 1, column title: expected string, got bool\. Write it as text"),
        ("title", 1.5, r"1\.5 is no whole number"),
        ("brand", ["Acme"], r"expected string, got list"),
        ("attributes", "red", r"row 1, column attributes: 'red' is no JSON"),
        ("attributes", ["red"], r"expected a map of text, got \['red'\]"),
        ("attributes", {"a": {"b": "c"}}, r"is an object inside of attributes"),
        ("attributes", {1: "x"}, r"expected names that are text, got 1"),
    ],
)
def test_a_value_that_no_table_may_hold_is_named_with_its_row(column: str, value: object, message: str) -> None:
    pair = {"market": "us", "language": "en", "query": "tv", "title": "TV"}
    pairs = pd.DataFrame([pair, pair | {column: value}])

    with pytest.raises(InputError, match=message):
        list(pair_texts(pairs))


@pytest.mark.parametrize("column", ["query", "title"])
@pytest.mark.parametrize("value", [None, float("nan"), "", " \u200b\n"])
def test_a_pair_without_a_query_or_title_has_no_score(pairs_pdf: pd.DataFrame, column: str, value: object) -> None:
    pairs = pairs_pdf.head(3).copy()
    pairs[column] = pairs[column].astype(object)
    pairs.iloc[1, pairs.columns.get_loc(column)] = value
    scored = scorer().score(pairs)
    assert scored["relevance_score"].notna().tolist() == [True, False, True]
    assert scored["predicted_grade"].notna().tolist() == [True, False, True]
    assert np.isfinite(scorer().score_parts(pairs)).all()
