"""Judged pairs in other languages: the same labels, prompts in another language."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.checks import check_data
from csrm.training.data.judged import Fold, JudgedInputs, JudgedPairs
from csrm.training.data.translated_rows import TRANSLATED, TranslatedRows
from csrm.training.model.base import BaseModel
from csrm.training.relevance import RelevanceStage
from csrm.training.settings import TrainConfig

TEXTS = [
    ("kr", "query", "q1", "en", "towel"),
    ("kr", "product", "p1", "en", "bath towel"),
    ("kr", "product", "r1", "en", "soft towel"),
    ("kr", "query", "q2", "zh-TW", "毯子"),
    ("kr", "query", "q3", "en", "  "),
]


def write(folder: Path, **tables: pd.DataFrame) -> dict[str, InputSpec]:
    for name, table in tables.items():
        table.to_parquet(folder / f"{name}.parquet")
    return {name: InputSpec(path=str(folder / f"{name}.parquet"), format="parquet") for name in tables}


@pytest.fixture
def inputs(tmp_path: Path) -> JudgedInputs:
    """Three Korean queries to train on, of two products; an English one measures the model."""
    grades = {"q1": "EI", "q2": "SE", "q3": "IE"}
    judged = [("kr", q, f"p{n}", g, None) for q, both in grades.items() for n, g in enumerate(both, 1)]
    judged += [("us", "q9", "p9", "E", "test")]
    texts = {"q1": "수건", "q2": "담요", "q3": "베개"}
    queries = [("kr", q, text) for q, text in texts.items()] + [("us", "q9", "Blanket")]
    products = [("kr", "p1", "목욕 수건", "하라"), ("kr", "p2", "양모 담요", None), ("us", "p9", "x", None)]
    titles = [
        ("kr", "q1", 1, "r1", "부드러운 수건"),
        ("kr", "q1", 2, "r2", "큰 수건"),
        ("kr", "q2", 1, "r1", "부드러운 수건"),
    ]
    tables = {
        "judgments": pd.DataFrame(judged, columns=["market", "query_id", "product_id", "grade", "split"]),
        "queries": pd.DataFrame(queries, columns=["market", "query_id", "query"]),
        "catalog": pd.DataFrame(products, columns=["market", "product_id", "title", "brand"]),
        "retrieval_table": pd.DataFrame(titles, columns=["market", "query_id", "rank", "product_id", "title"]).assign(
            similarity=1.0, source="lexical"
        ),
    }
    return JudgedInputs(**write(tmp_path, **tables))


def rows_of(
    inputs: JudgedInputs, folder: Path, texts: list[tuple[str, ...]], weight: float = 1.0, **choice: Any
) -> pd.DataFrame:
    """The added rows, by query and product."""
    table = pd.DataFrame(texts, columns=["market", "kind", "id", "language", "text"])
    settings = TranslatedRows(texts=write(folder, texts=table)["texts"], weight=weight)
    with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
        num_pairs = pairs.add_translated(settings, inputs.retrieval_table)
        found = pd.concat([pd.DataFrame(), *pairs.groups(TRANSLATED, 8, 0, **choice)])
        assert choice or num_pairs == len(found)
    return found.sort_values(["query_id", "product_id", "language"], ignore_index=True) if len(found) else found


def test_texts_are_those_of_the_language_and_the_label_stays(inputs: JudgedInputs, tmp_path: Path) -> None:
    found = rows_of(inputs, tmp_path, TEXTS)
    names = ["query_id", "product_id", "language", "query", "title", "brand", "grade"]
    assert found[names].to_numpy().tolist() == [
        ["q1", "p1", "en", "towel", "bath towel", None, "E"],
        ["q1", "p2", "en", "towel", "양모 담요", None, "I"],
        ["q2", "p1", "ko", "담요", "bath towel", None, "S"],  # the query has no English text
        ["q2", "p1", "zh-TW", "毯子", "목욕 수건", "하라", "S"],  # the title has no Chinese text
        ["q2", "p2", "zh-TW", "毯子", "양모 담요", None, "E"],
        ["q3", "p1", "ko", "베개", "bath towel", None, "I"],
    ]
    titles = found.drop_duplicates(["query_id", "language"]).set_index(["query_id", "language"])["retrieved_titles"]
    assert titles["q1", "en"] == ("soft towel", "큰 수건")
    assert titles["q2", "ko"] == titles["q2", "zh-TW"] == ("부드러운 수건",)
    assert set(found["weight"]) == {1.0}


def test_the_prompts_have_the_translated_texts(
    inputs: JudgedInputs, tmp_path: Path, loud_base_model: Path, prompt_tokenizer: PromptTokenizer
) -> None:
    table = pd.DataFrame(TEXTS, columns=["market", "kind", "id", "language", "text"])
    config = TrainConfig(
        markets={"kr": "ko"},
        inputs=inputs,
        base_model=BaseModel(folder=str(loud_base_model)),
        translated_rows=TranslatedRows(texts=write(tmp_path, texts=table)["texts"]),
        model_dir=str(tmp_path / "model"),
    )
    with JudgedPairs(inputs, config.markets) as pairs:
        data = check_data(pairs, config)
        packs = list(RelevanceStage(config, data, prompt_tokenizer, config.base_model, None).packs())
    prompts = [
        prompt_tokenizer.decode([*group.prefix_ids, *suffix])
        for pack in packs
        for group in pack.groups
        for suffix in group.suffixes
    ]
    assert len(prompts) == 6 + 6
    english = [prompt for prompt in prompts if "Language: en\nQuery: towel\n" in prompt]
    assert len(english) == 2
    assert sum("Product: bath towel\n" in prompt for prompt in english) == 1
    assert all("Market: kr\n" in prompt for prompt in prompts)
    assert sum("Language: zh-TW\nQuery: 毯子\n" in prompt for prompt in prompts) == 2
    assert sum("Query: 수건\n" in prompt for prompt in prompts) == 2  # as they were judged


def test_a_translation_that_measures_a_model_is_left_out(
    inputs: JudgedInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    found = rows_of(inputs, tmp_path, [*TEXTS, ("kr", "query", "q2", "en", "BLANKET")])
    assert "q2 en" not in set(found["query_id"] + " " + found["language"])
    assert not found["query"].str.casefold().eq("blanket").any()
    assert "q2 ko" not in set(found["query_id"] + " " + found["language"])
    assert "5 judged pairs are learnt in other languages too: en, zh-TW; 1 queries left out" in caplog.text


def test_a_translation_goes_where_its_query_goes(inputs: JudgedInputs, tmp_path: Path) -> None:
    """A teacher that judges a query has not seen it in another language."""
    texts = [
        ("kr", "query", f"q{n}", language, f"{language} {n}") for n in (1, 2, 3) for language in ("en", "de", "fr")
    ]
    whole = set(rows_of(inputs, tmp_path, texts)["query_id"])
    assert whole == {"q1", "q2", "q3"}
    for number in range(2):
        fold = Fold(number, 2, seed=3)
        with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
            kept = {key for batch in pairs.groups("train", 8, 0, without=fold) for key in batch["query_id"]}
        assert 0 < len(kept) < 3
        assert set(rows_of(inputs, tmp_path, texts, without=fold)["query_id"]) == kept


def test_soft_labels_and_judges_weights_hold_in_every_language(inputs: JudgedInputs, tmp_path: Path) -> None:
    judgments = pd.read_parquet(tmp_path / "judgments.parquet").assign(judge="a", weight=1.0)
    second = judgments[:1].assign(judge="b", grade="I")
    judgments.loc[2, "weight"] = 0.5  # q2 p1
    pd.concat([judgments, second]).to_parquet(tmp_path / "judgments.parquet")
    key = {"market": "kr", "query_id": "q1", "product_id": "p2"}
    soft = pd.DataFrame([{**key, "soft_label": [0.5, 0.5], "weight": 1.0}])
    soft.to_parquet(tmp_path / "soft.parquet")
    found = rows_of(inputs, tmp_path, TEXTS, weight=0.5, soft_labels=tmp_path / "soft.parquet")
    by_pair = found.set_index(["query_id", "product_id", "language"])
    assert dict(by_pair["votes"]["q1", "p1", "en"]) == {"E": 0.5, "I": 0.5}
    assert by_pair["soft_label"]["q1", "p2", "en"].tolist() == [0.5, 0.5]
    weights = by_pair["weight"].to_dict()
    assert weights.pop(("q2", "p1", "zh-TW")) == weights.pop(("q2", "p1", "ko")) == 0.25
    assert set(weights.values()) == {0.5}


def test_texts_in_the_language_of_their_query_or_market_are_left_out(
    inputs: JudgedInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the pair would be learnt twice in its own language."""
    queries = pd.read_parquet(tmp_path / "queries.parquet").assign(language=[None, "en", None, None])  # q2 is English
    queries.to_parquet(tmp_path / "queries.parquet")
    texts = [
        ("kr", "query", "q1", "KO", "수건"),
        ("kr", "product", "p1", "ko", "목욕 수건"),
        ("kr", "query", "q2", "en", "blanket"),
        ("kr", "query", "q3", "en", "pillow"),
    ]
    found = rows_of(inputs, tmp_path, texts)
    assert found["query"].tolist() == ["pillow", "pillow"]
    assert "3 texts are in the language that their query or market has, and are left out" in caplog.text
    with pytest.raises(InputError, match="and languages others than theirs"):
        rows_of(inputs, tmp_path, texts[:3])


def test_random_negatives_are_of_one_language_judged_in_none_and_weigh_as_the_rows(
    inputs: JudgedInputs, tmp_path: Path
) -> None:
    """Two languages of all texts: of each query and product, one pair is judged."""
    judgments = pd.read_parquet(tmp_path / "judgments.parquet")
    kept = judgments[~((judgments["query_id"] + judgments["product_id"]).isin(["q1p2", "q2p1"]))]
    kept.to_parquet(tmp_path / "judgments.parquet")
    texts = [
        ("kr", kind, f"{kind[0]}{n}", language, f"{language} {kind} {n}")
        for kind, numbers in (("query", (1, 2, 3)), ("product", (1, 2)))
        for n in numbers
        for language in ("en", "de", "fr")
    ]
    found = rows_of(inputs, tmp_path, texts, weight=0.25, random_negatives=1.0)
    negatives = found[found["grade"].isna()]
    assert set(negatives["query_id"] + negatives["product_id"]) <= {"q1p2", "q2p1"}
    assert len(negatives) > 0
    assert (negatives["title"].str[:2] == negatives["language"]).all()
    assert set(found["weight"]) == {0.25}


def test_label_issues_name_a_pair_once(inputs: JudgedInputs, tmp_path: Path) -> None:
    table = pd.DataFrame(TEXTS, columns=["market", "kind", "id", "language", "text"])
    with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
        before = pairs.digest()
        pairs.add_translated(TranslatedRows(texts=write(tmp_path, texts=table)["texts"]), None)
        assert pairs.digest() != before
        keyed = pd.DataFrame([("kr", "q1", "p1")], columns=["market", "query_id", "product_id"])
        assert pairs.with_texts(keyed)["title"].tolist() == ["목욕 수건"]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([("kr", "query", "q8", "en", "x")], r"no text is of a query or product .*markets \['kr'\]\. Are market, kind"),
        ([("us", "query", "q9", "ko", "x")], "no text is of a query or product"),
        ([("kr", "title", "p1", "en", "x")], r"column 'kind' has \['title'\], expected query or product"),
        ([("kr", "query", "q1", "en", "x")] * 2, r"2 rows share their key \(market, kind, id, language\)"),
    ],
)
def test_texts_that_join_nothing_are_refused(
    texts: list[tuple[str, ...]], message: str, inputs: JudgedInputs, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        rows_of(inputs, tmp_path, texts)


def test_a_weight_is_above_0() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        TranslatedRows(texts=InputSpec(path="x"), weight=0)
