"""Base models from their files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from csrm.errors import ConfigError
from csrm.training.model.base import BaseModel, load_language_model, load_tokenizer
from csrm.training.model.families import check_model
from csrm.training.model.weight_files import tensor_shapes

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


def cut_off(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def cut_off_in_its_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def in_shards(folder: Path, num_shards: int = 2) -> dict[str, str]:
    """The weights in several files with their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{place % num_shards}.safetensors" for place, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        part = {name: tensors[name] for name, place in places.items() if place == shard}
        save_file(part, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def missing_shard(folder: Path) -> None:
    in_shards(folder)
    (folder / "model-1.safetensors").unlink()


def shard_of_another_index(folder: Path) -> None:
    places = in_shards(folder)
    swapped = dict.fromkeys(places, "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": swapped}))


def index_of_something_else(folder: Path) -> None:
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text('{"weights": 1}')


def config_with(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')


def tokenizer_of_another_model(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"word{number}" for number in range(1_000)])
    tokenizer.save(str(folder / "tokenizer.json"))


BROKEN = [
    (cut_off, r"model.safetensors has [\d,]+ bytes, expected [\d,]+: it was cut off"),
    (cut_off_in_its_header, "model.safetensors is no safetensors file, or was cut off: it has 20 bytes"),
    (pointer, "model.safetensors is a pointer of Git LFS"),
    (no_weights, "has no model.safetensors and no model.safetensors.index.json"),
    (missing_shard, "model-1.safetensors is missing"),
    (shard_of_another_index, r"model-1.safetensors lacks \d+ tensors that .* puts there, such as model.embed_tokens"),
    (index_of_something_else, r"index.json' cannot be read: KeyError\('weight_map'\)"),
    (config_with(quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"}), "weights are quantized"),
    (config_with(model_type="gpt2"), "of type 'gpt2': supported are Qwen2"),
    (config_with(model_type="none_such"), "Its configuration cannot be read"),
    (no_tokenizer, "its tokenizer cannot be read"),
    (broken_tokenizer, "its tokenizer cannot be read"),
    (tokenizer_of_another_model, r"tokens up to id \d+ \('word999'\), but the model has \d+ embeddings"),
]


@pytest.mark.parametrize(("breakage", "message"), BROKEN, ids=[message[:30] for _, message in BROKEN])
def test_a_broken_base_model_is_one_error_before_its_weights_are_read(
    loud_base_model: Path, tmp_path: Path, breakage: Callable[[Path], None], message: str
) -> None:
    folder = Path(shutil.copytree(loud_base_model, tmp_path / "base"))
    base_model = BaseModel(folder=str(folder))
    check_model(base_model, 352, tokenizer=load_tokenizer(base_model))
    breakage(folder)
    with pytest.raises(ConfigError, match=message):
        check_model(base_model, 352, tokenizer=load_tokenizer(base_model))


def test_a_model_in_shards_is_read_as_one_in_one_file(loud_base_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loud_base_model, tmp_path / "base"))
    whole, shapes = load_language_model(BaseModel(folder=str(folder))).state_dict(), tensor_shapes(folder)
    in_shards(folder)
    sharded = load_language_model(BaseModel(folder=str(folder))).state_dict()
    assert tensor_shapes(folder) == shapes
    assert all(torch.equal(tensor, sharded[name]) for name, tensor in whole.items())


def test_weights_that_are_not_there_are_not_made_at_random(loud_base_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(loud_base_model, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    absent = next(name for name in sorted(tensors) if "mlp" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != absent}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"lack 1 weights .* such as {absent}"):
        load_language_model(BaseModel(folder=str(folder)))


def test_a_broken_gguf_file_is_one_error(gemma_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(gemma_gguf.read_bytes()[:200])
    with pytest.raises(ConfigError, match=r"base_model 'cut\.gguf': its tokenizer cannot be read"):
        load_tokenizer(BaseModel(folder=str(tmp_path), gguf_file="cut.gguf"))
