"""Tests of csrm.training.model.tiny."""

from itertools import product
from pathlib import Path

import pandas as pd
import pytest

from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.model.base import BaseModel, load_language_model
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer
from csrm.training.model.tiny import train_byte_tokenizer, write_tiny_base_model


def test_a_folding_tokenizer_knows_a_word_wherever_it_stands() -> None:
    tokenizer = train_byte_tokenizer(["red shoes 黑色跑鞋"] * 50, 400, folds=True)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    assert ids(" Red shoes") == ids(" RED SHOES")
    assert ids(" red Shoes")[-1:] == ids(" shoes")
    assert ids(" shoes red") == ids(" shoes") + ids(" red")
    assert ids("跑鞋黑色") == ids("跑鞋") + ids("黑色")
    assert ids("跑鞋") == ids("跑") + ids("鞋")
    assert len(ids(" shoes")) == 1
    assert ids(" shoes") != ids(" sh oes")


def test_a_space_before_a_han_character_takes_no_token() -> None:
    tokenizer = train_byte_tokenizer(["red shoes 黑色跑鞋"] * 50, 400, folds=True)

    assert tokenizer.encode(" 跑鞋", add_special_tokens=False).ids == tokenizer.encode("跑鞋").ids


@pytest.mark.parametrize("matches_words", [True, False])
def test_a_model_that_matches_words_ranks_by_them_untrained(tmp_path: Path, matches_words: bool) -> None:
    kinds = ["shoes", "lamp", "tent", "soap", "mug", "sofa", "scarf", "kettle"]
    colours = ["red", "blue", "green", "black", "white", "pink"]
    titles = [f"{colour} {kind}" for kind in kinds for colour in colours]
    folder = write_tiny_base_model(
        tmp_path / "model",
        train_byte_tokenizer(titles * 20, 400, folds=True),
        hidden_size=96,
        num_layers=3,
        matches_words=matches_words,
    )
    tokenizer = PromptTokenizer.from_json((folder / "tokenizer.json").read_text(encoding="utf-8"), Budgets())
    model = PackedRelevanceModel(load_language_model(BaseModel(folder=str(folder))), tokenizer.label_ids(ESCI_LABELS))
    scorer = PairScorer(tokenizer, ESCI_LABELS, pack_scorer=torch_pack_scorer(model), tokens_per_call=1024)
    pairs = pd.DataFrame(product(titles[::7], titles), columns=["query", "title"]).assign(market="us", language="en")

    scores = scorer.score(pairs)["relevance_score"]

    best = pairs.loc[scores.groupby(pairs["query"]).idxmax()]
    found = (best["query"] == best["title"]).mean()
    assert found >= 0.8 if matches_words else found <= 0.4
