"""What a prompt holds, field by field, and what each part does to the score."""

import numpy as np
import pandas as pd
import pytest

import csrm
from csrm.errors import InputError
from csrm.scoring import explain, label_probabilities
from csrm.scoring.labels import ESCI_LABELS, expected_gain
from csrm.scoring.prompts import MOST_CHARACTERS, Product, Query, prompt_text
from csrm.scoring.scorer import PAIR_COLUMNS, PairScorer
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from tests.conftest import GOLDEN

QUERY = Query("kr", "ko", "여성 운동화", ("경량 스니커즈", "여성용 러닝화 240", " \u200b"))
PRODUCT = Product("하라 쿠션 운동화 <b>", "하라", "신발", {"색상": "흰색", "사이즈": "240"})
PAIR = dict(zip(PAIR_COLUMNS, (*QUERY, *PRODUCT), strict=True))


@pytest.fixture
def scorer(loud_model: object, prompt_tokenizer: PromptTokenizer) -> PairScorer:
    from csrm.training.model.relevance import torch_pack_scorer

    return PairScorer(prompt_tokenizer, ESCI_LABELS, pack_scorer=torch_pack_scorer(loud_model), tokens_per_call=512)


def narrow(**budgets: int) -> PromptTokenizer:
    return PromptTokenizer.from_file(GOLDEN / "tokenizer.json", Budgets(**budgets))


def test_parts_are_the_prompt_field_by_field(prompt_tokenizer: PromptTokenizer) -> None:
    parts = prompt_tokenizer.prompt_parts(QUERY, PRODUCT)

    assert [(part.field, part.text) for part in parts] == [
        ("market", "kr"),
        ("language", "ko"),
        ("query", "여성 운동화"),
        ("retrieved_title", "경량 스니커즈"),
        ("retrieved_title", "여성용 러닝화 240"),
        ("title", "하라 쿠션 운동화 ‹b›"),
        ("brand", "하라"),
        ("category", "신발"),
        ("attributes", "사이즈 = 240; 색상 = 흰색"),
    ]
    assert {part.cut for part in parts} == {""}
    assert all(part.text in prompt_text(QUERY, PRODUCT) for part in parts)
    template = prompt_text(QUERY, PRODUCT)
    for part in parts:
        template = template.replace(f" {part.text}", "", 1)
    num_tokens = len(prompt_tokenizer.prefix_ids([QUERY])[0]) + len(prompt_tokenizer.suffix_ids([PRODUCT])[0])
    assert 0 < sum(part.num_tokens for part in parts) < num_tokens


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 8])
def test_what_a_budget_keeps_and_what_it_cuts_are_the_whole_field(budget: int) -> None:
    tokenizer = narrow(title=budget, query=48)
    (part,) = (part for part in tokenizer.prompt_parts(QUERY, PRODUCT) if part.field == "title")

    assert part.num_tokens == budget
    assert part.text + part.cut in ("하라 쿠션 운동화 ‹b›", "하라 쿠션 운동화‹b›") or part.cut.startswith(" ")
    assert (part.text + part.cut).replace(" ", "") == "하라쿠션운동화‹b›"
    assert part.cut
    kept = tokenizer.decode(tokenizer.suffix_ids([PRODUCT])[0])
    assert part.text.replace(" ", "")[: max(1, len(part.text) - 2)] in kept.replace(" ", "")


def test_a_field_without_room_is_there_with_nothing_kept() -> None:
    tokenizer = narrow(suffix=30, title=12, brand=4)
    parts = {part.field: part for part in tokenizer.prompt_parts(QUERY, PRODUCT._replace(title="운동화 " * 40))}

    assert parts["attributes"].num_tokens == 0
    assert (parts["attributes"].text, parts["attributes"].cut.strip()) == ("", "사이즈 = 240; 색상 = 흰색")
    assert parts["title"].num_tokens == 12


def test_huge_text_is_cut_before_it_is_tokenised_and_the_rest_that_a_prompt_knows_is_said(
    prompt_tokenizer: PromptTokenizer,
) -> None:
    title = "가" * 100_000
    (part,) = (p for p in prompt_tokenizer.prompt_parts(QUERY, Product(title)) if p.field == "title")

    assert part.num_tokens == 48
    assert len(part.text) + len(part.cut) == MOST_CHARACTERS


def test_the_effect_of_a_part_is_the_score_less_that_without_it(scorer: PairScorer) -> None:
    parts = explain(scorer, PAIR)

    def score(**changes: object) -> float:
        return float(scorer.score_parts(pd.DataFrame([{**PAIR, **changes}]))[0])

    whole = score()
    assert parts.attrs["relevance_score"] == pytest.approx(whole, abs=1e-5)
    expected = {
        "query": score(query=None),
        "title": score(title=None),
        "brand": score(brand=None),
        "category": score(category=None),
        "attributes": score(attributes=None),
    }
    found = parts.set_index("field")["score_without"]
    for name, without in expected.items():
        assert found[name] == pytest.approx(without, abs=1e-5)
    first, second = QUERY.retrieved_titles[:2]
    np.testing.assert_allclose(
        found["retrieved_title"], [score(retrieved_titles=[second]), score(retrieved_titles=[first])], atol=1e-5
    )
    assert found[["market", "language"]].isna().all()
    np.testing.assert_allclose(parts["effect"].dropna(), (whole - parts["score_without"]).dropna(), atol=1e-5)
    assert parts["effect"].abs().max() > 0.01  # a loud model: parts do something


def test_a_pair_needs_its_columns_and_others_are_not_needed(scorer: PairScorer) -> None:
    with pytest.raises(InputError, match=r"missing columns \['title'\]"):
        explain(scorer, {name: PAIR[name] for name in ("market", "language", "query")})
    parts = explain(scorer, {name: PAIR[name] for name in ("market", "language", "query", "title")})
    assert parts["field"].tolist() == ["market", "language", "query", "title"]


def test_probabilities_give_the_score(scorer: PairScorer, pairs_pdf: pd.DataFrame) -> None:
    probabilities = label_probabilities(scorer, pairs_pdf)

    assert list(probabilities.columns) == ["I", "C", "S", "E"]
    gains = np.array([label.gain for label in ESCI_LABELS])
    scores = scorer.score(pairs_pdf)["relevance_score"]
    np.testing.assert_allclose(probabilities.to_numpy() @ gains, scores, atol=1e-6)
    np.testing.assert_allclose(expected_gain(np.log(probabilities.to_numpy()), gains), scores, atol=1e-6)


def test_it_is_in_the_public_api() -> None:
    assert csrm.explain is explain
