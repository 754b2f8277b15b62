from pathlib import Path

import pandas as pd
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.scoring.prompts import Translation
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.data.parallel_text import ParallelText, is_in_script
from csrm.training.model.relevance import PackedRelevanceModel
from csrm.training.translation_quality import translation_quality

ROWS = [
    ("ko", "en", "수건", "towel", "train"),
    ("ko", "en", "수건", "towel", "train"),
    ("ko", "zh-TW", "무선 마우스", "無線滑鼠", None),
    ("ko", "en", "USB-C", "usb-c", "train"),
    ("es", "en", "camping tents", "camping tent", "train"),
    ("zh-TW", "zh-CN", "電動工具充電式電池一二", "電動工具充電式電池三四", "train"),
    ("ko", "en", "towel rack", "towel holder", "train"),
    ("ko", "en", " ", "towel", "train"),
    ("ko", "en", None, "towel", "train"),
    ("ko", "en", "담요", "blanket", "dev"),
]


@pytest.fixture
def spec(tmp_path: Path) -> InputSpec:
    names = ["source_language", "target_language", "source_text", "target_text", "split"]
    pd.DataFrame(ROWS, columns=names).to_parquet(tmp_path / "parallel.parquet")
    return InputSpec(path=str(tmp_path / "parallel.parquet"), format="parquet")


def test_both_directions_are_learnt_and_what_is_left_out_is_counted(spec: InputSpec) -> None:
    parallel = ParallelText(spec)
    texts = [text for batch in parallel.translations("train", seed=0) for text in batch]
    assert set(texts) == {
        Translation("ko", "en", "수건", "towel"),
        Translation("en", "ko", "towel", "수건"),
        Translation("ko", "zh-TW", "무선 마우스", "無線滑鼠"),
        Translation("zh-TW", "ko", "無線滑鼠", "무선 마우스"),
    }
    assert len(texts) == 4
    assert parallel.num_kept == 2
    assert parallel.num_left_out == {"repeated": 1, "copy": 1, "near_copy": 2, "wrong_script": 1, "empty": 2}


def test_the_order_depends_on_the_seed_and_can_be_repeated_without_end(spec: InputSpec) -> None:
    orders = {tuple(next(ParallelText(spec).translations("train", seed))) for seed in range(8)}
    assert len(orders) > 2
    endless = ParallelText(spec).translations("train", seed=0, repeat=True)
    assert sum(len(next(endless)) for _ in range(3)) == 12


def test_a_split_without_usable_text_is_an_error(spec: InputSpec) -> None:
    with pytest.raises(InputError, match=r"parallel_text .*split 'test'.*got none; left out: none"):
        list(ParallelText(spec).translations("test", seed=0))


def test_the_first_texts_of_a_split_which_may_have_none(spec: InputSpec) -> None:
    parallel = ParallelText(spec)
    assert parallel.first("dev", 0, 1) == next(parallel.translations("dev", 0))[:1]
    assert parallel.first("test", 0, 3) == []


def test_held_out_texts_are_not_learnt_in_either_direction(spec: InputSpec) -> None:
    rows = pd.read_parquet(spec.path)
    seen = [
        ("ko", "en", "수건", "Towel ", "dev"),
        ("zh-TW", "ko", "無線滑鼠", "무선 마우스", "dev"),
        ("ko", "en", "수건", "bath towel", "dev"),
    ]
    pd.concat([rows, pd.DataFrame(seen, columns=rows.columns)]).to_parquet(spec.path)
    parallel = ParallelText(spec)
    held_out = parallel.first("dev", 0, 9)
    assert {text.target_text for text in held_out} == {"수건", "bath towel", "담요", "blanket"}
    assert len(held_out) == 4
    assert parallel.first("train", 0, 9) == []


def test_missing_columns_are_named(tmp_path: Path) -> None:
    pd.DataFrame({"source_language": ["ko"], "text": ["수건"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"missing column 'target_language' for target_language"):
        list(ParallelText(InputSpec(path=str(tmp_path / "x.parquet"), format="parquet")).translations("train", 0))


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("USB 케이블", "ko", True),
        ("USB cable", "ko", False),
        ("かさ 우산", "ko", False),
        ("無線滑鼠 2.4G", "zh-TW", True),
        ("ワイヤレスマウス 無線", "zh-TW", False),
        ("折りたたみ傘", "ja", True),
        ("우산", "ja", False),
        ("taza térmica", "es", True),
        ("毛巾 towel", "en", False),
        ("2.4", "en", False),
        ("ผ้าขนหนู", "th", True),
    ],
)
def test_the_script_of_a_text(text: str, language: str, expected: bool) -> None:
    assert is_in_script(text, language) is expected


def test_quality_is_that_of_the_model(loud_model: PackedRelevanceModel, prompt_tokenizer: PromptTokenizer) -> None:
    texts = [Translation("ko", "en", "무선 마우스", "wireless mouse"), Translation("en", "ko", "towel", "수건")]
    quality = translation_quality(loud_model, prompt_tokenizer, texts, text_tokens=8)
    assert quality.num_texts == 2
    assert quality.loss > 1
    assert quality.loss != quality.loss_without_source
    assert 0 <= quality.chrf < 30  # untrained
