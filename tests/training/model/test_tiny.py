"""Tests of csrm.training.model.tiny."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from csrm.training.model.tiny import train_byte_tokenizer, write_tiny_base_model

TEXTS = ["red canvas shoes", "a desk of oak", "防水登山鞋", "녹색 우산"]


def test_a_folding_tokenizer_knows_a_word_wherever_it_stands() -> None:
    tokenizer = train_byte_tokenizer(["red shoes 黑色跑鞋"] * 50, 400, folds=True)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    assert ids("Red shoes") == ids("RED SHOES")
    assert ids("red Shoes")[-1:] == ids("shoes")
    assert ids("shoes red") == ids("shoes") + ids("red")
    assert ids("跑鞋黑色") == ids("跑鞋") + ids("黑色")
    assert ids("跑鞋") == ids("跑") + ids("鞋")
    assert len(ids("shoes")) == 1
    assert ids("shoes") != ids("sh oes")


@pytest.mark.parametrize("finds_repeats", [True, False])
def test_a_model_that_finds_repeats_attends_to_them_untrained(tmp_path: Path, finds_repeats: bool) -> None:
    tokenizer = train_byte_tokenizer(TEXTS, 300)
    folder = write_tiny_base_model(tmp_path / "model", tokenizer, hidden_size=96, finds_repeats=finds_repeats)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    others = [*range(20, 28), *range(40, 48)]
    found = 0
    for place, repeated in enumerate(others):
        with torch.no_grad():
            attentions = model(torch.tensor([[*others, repeated]]), output_attentions=True).attentions
        found += attentions[0][0, :, -1, :-1].mean(dim=0).argmax().item() == place
    assert found >= 12 if finds_repeats else found <= 4
