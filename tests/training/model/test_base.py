"""Base models from their files."""

from pathlib import Path

import gguf
import pytest

from csrm.training.model.base import BaseModel, load_tokenizer

NORMAL, CONTROL, BYTE = 1, 3, 6


@pytest.fixture(scope="module")
def gemma_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file with the tokenizer of a Gemma that knows few words: pieces are scored by their merge rank."""
    pieces = ["▁", *"abdeglosy", "Q", "u", "ry", "er", "▁y", "es", "▁yes", "Qu", "Query", "ery", "r"]
    tokens = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", CONTROL)]
    tokens += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    tokens += [(piece, NORMAL) for piece in pieces]
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "gemma3")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_scores(
        [{CONTROL: -1000.0, BYTE: 0.0}.get(kind, float(-1 - number)) for number, (_, kind) in enumerate(tokens)]
    )
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return folder / "tiny.gguf"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (" yes", ["▁yes"]),  # one token, so that it can be a label
        ("Query", ["Query"]),
        ("Query yes", ["Query", "▁yes"]),
        ("yes", ["y", "es"]),
        (" é", ["▁", "<0xC3>", "<0xA9>"]),
    ],
)
def test_a_gemma_gguf_gets_its_byte_pair_merges_back(gemma_gguf: Path, text: str, tokens: list[str]) -> None:
    tokenizer = load_tokenizer(BaseModel(folder=str(gemma_gguf.parent), gguf_file=gemma_gguf.name))

    assert tokenizer.encode(text).tokens == ["<bos>", *tokens]
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text
