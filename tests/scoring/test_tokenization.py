import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from csrm.errors import ConfigError
from csrm.scoring.labels import BINARY_LABELS, ESCI_LABELS, Label
from csrm.scoring.prompts import ANSWER_CUE, Product, Query, Translation, prompt_text
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from tests.scoring.test_prompts import hostile_text

GOLDEN = Path(__file__).parents[1] / "golden"
SPECIAL_IDS = {0, 1, 2}


def golden_tokenizer(budgets: Budgets | None = None) -> PromptTokenizer:
    return PromptTokenizer.from_file(GOLDEN / "tokenizer.json", budgets or Budgets())


def golden_cases() -> list[dict]:
    return json.loads((GOLDEN / "prompts.json").read_text(encoding="utf-8"))


def query_and_product(case: dict) -> tuple[Query, Product]:
    query = Query(**{**case["query"], "retrieved_titles": tuple(case["query"]["retrieved_titles"])})
    return query, Product(**case["product"])


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["name"])
def test_golden_prompts_keep_their_text_and_token_ids(case: dict) -> None:
    """A change here changes every score: raise TEMPLATE_VERSION and make the golden file again, on purpose."""
    query, product = query_and_product(case)
    tokenizer = golden_tokenizer()
    (prefix_ids,), (suffix_ids,) = tokenizer.prefix_ids([query]), tokenizer.suffix_ids([product])
    assert tokenizer.decode(prefix_ids) + tokenizer.decode(suffix_ids) == case["text"]
    assert prefix_ids == case["prefix_ids"]
    assert suffix_ids == case["suffix_ids"]


def test_uncut_ids_decode_to_the_prompt_text() -> None:
    query = Query("tw", "zh-TW", "透明手機殼", ("軍規防摔殼",))
    product = Product("磁吸手機殼 ✨", None, "手機配件", {"顏色": "透明"})
    tokenizer = golden_tokenizer()
    (prefix_ids,), (suffix_ids,) = tokenizer.prefix_ids([query]), tokenizer.suffix_ids([product])
    assert tokenizer.decode(prefix_ids + suffix_ids) == prompt_text(query, product)


def test_over_long_fields_never_cost_the_query_or_the_cue() -> None:
    budgets = Budgets(query=10, retrieved_title=6, prefix=60, title=8, brand=4, category=4, attributes=6, suffix=40)
    tokenizer = golden_tokenizer(budgets)
    query = Query("us", "en", "red shoes " * 1000, ("blue boots " * 1000,) * 50)
    product = Product("running shoes " * 1000, "brand " * 99, "category " * 99, {"color": "red " * 99})
    (prefix_ids,), (suffix_ids,) = tokenizer.prefix_ids([query]), tokenizer.suffix_ids([product])
    assert len(prefix_ids) <= 60
    assert len(suffix_ids) <= 40
    prefix, suffix = tokenizer.decode(prefix_ids), tokenizer.decode(suffix_ids)
    assert prefix.startswith("Task: relevance\nMarket: us\nLanguage: en\nQuery: red sh")
    assert suffix.endswith(ANSWER_CUE)
    assert suffix.startswith("\nProduct: running")


@given(hostile_text, hostile_text, st.lists(hostile_text, max_size=4))
def test_no_text_becomes_structure(query: str, title: str, titles: list[str]) -> None:
    tokenizer = golden_tokenizer()
    product = Product(title, query, title, {query: title})
    (prefix_ids,) = tokenizer.prefix_ids([Query("kr", "ko", query, tuple(titles))])
    (suffix_ids,) = tokenizer.suffix_ids([product])
    budgets = Budgets()
    assert len(prefix_ids) <= budgets.prefix
    assert len(suffix_ids) <= budgets.suffix
    assert SPECIAL_IDS.isdisjoint(prefix_ids + suffix_ids)
    assert tokenizer.decode(suffix_ids).count(ANSWER_CUE) == 1
    assert tokenizer.decode(prefix_ids).count("\nQuery:") == 1


@given(hostile_text, hostile_text)
def test_a_text_has_the_same_ids_whatever_stands_beside_it(first: str, second: str) -> None:
    tokenizer = golden_tokenizer()
    together = tokenizer.suffix_ids([Product(first), Product(second), Product(first)])
    assert together == [tokenizer.suffix_ids([Product(text)])[0] for text in (first, second, first)]


def test_a_token_that_the_model_wants_first_opens_the_prefix_alone() -> None:
    raw = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    start = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    plain, started = golden_tokenizer(), PromptTokenizer(Tokenizer.from_str(json.dumps(raw)), Budgets())
    query, product = Query("us", "en", "shoes"), Product("shoes")
    assert started.prefix_ids([query]) == [[0, *plain.prefix_ids([query])[0]]]
    assert started.suffix_ids([product]) == plain.suffix_ids([product])


@pytest.mark.parametrize("is_special", [True, False])
def test_text_cannot_become_an_added_token(is_special: bool) -> None:
    raw = json.loads((GOLDEN / "tokenizer.json").read_text(encoding="utf-8"))
    template = raw["added_tokens"][0]
    marks = ["[control_8]", "[multimodal]", "[@BOS@]", "{{role}}", "#!sys"]
    next_id = 1 + max(raw["model"]["vocab"].values())
    raw["added_tokens"] += [
        {**template, "id": next_id + place, "content": mark, "special": is_special} for place, mark in enumerate(marks)
    ]
    raw["added_tokens"].append({**template, "id": next_id + len(marks), "content": "हिन्दी-thermo", "special": False})
    plain, tokenizer = golden_tokenizer(), PromptTokenizer(Tokenizer.from_str(json.dumps(raw)), Budgets())
    for mark in marks:
        product = Product(f"tea {mark} pot", mark, mark * 3, {mark: f"a{mark}b"})
        (ids,) = tokenizer.suffix_ids([product])
        (prefix_ids,) = tokenizer.prefix_ids([Query("us", "en", mark, (mark, f"x{mark}"))])
        (given, learnt), *_ = tokenizer.translation_ids([Translation("en", "ko", mark, mark)], 20)
        assert max(ids + prefix_ids + given + learnt) < next_id
        assert mark.strip("[]{}#") in tokenizer.decode(ids)  # it is still said
    assert tokenizer.suffix_ids([Product("tea [pot]")]) == plain.suffix_ids([Product("tea [pot]")])
    assert next_id + len(marks) in tokenizer.suffix_ids([Product("my हिन्दी-thermo")])[0]  # a word is a word


def test_labels_are_one_token_each() -> None:
    tokenizer = golden_tokenizer()
    assert len(set(tokenizer.label_ids(ESCI_LABELS))) == 4
    assert tokenizer.label_ids(BINARY_LABELS) == [tokenizer.label_ids(ESCI_LABELS)[index] for index in (0, 3)]


def test_a_label_of_several_tokens_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"' irrelevantissimo' is \d+ tokens.*Choose other words"):
        golden_tokenizer().label_ids([replace(BINARY_LABELS[0], token=" irrelevantissimo"), BINARY_LABELS[1]])


def test_equal_labels_are_refused() -> None:
    with pytest.raises(ConfigError, match="tokens must differ"):
        golden_tokenizer().label_ids([Label("a", " yes", 0.0), Label("b", " yes", 1.0)])


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({"prefix": 40}, "prefix is 40 tokens, but its template"),
        ({"suffix": 50}, "suffix is 50 tokens"),
        ({"query": 0}, "query is 0"),
    ],
)
def test_budgets_without_room_are_refused(budgets: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        golden_tokenizer(Budgets(**budgets))
