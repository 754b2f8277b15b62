"""Milliseconds of a processor for a pair, by the most tokens of a call: what the default of a CPU rests on.

    python tests/benchmarks/call_sizes.py

Two seeded layers of three models' shapes score groups of random tokens in ONNX Runtime, with one thread: prefixes of
120 to 200 tokens with 12 or 100 products of 20 to 40, and prefixes of 30 to 80 with one product. All sizes take turns.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from speed_report import markdown

from csrm.export.packed_onnx import export_packed_graph
from csrm.scoring.packing import Group, build_packs
from csrm.scoring.runtime import load_pack_scorer
from csrm.training.model.relevance import PackedRelevanceModel

VOCABULARY = 512
SIZES = (512, 1_024, 2_048, 4_096)
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "the demo's": ("Qwen3", "Qwen3", {"hidden_size": 96, "num_attention_heads": 4, "intermediate_size": 192}),
    "SmolLM2-135M": ("Llama", "Llama", {"hidden_size": 576, "num_attention_heads": 9, "intermediate_size": 1536}),
    "Gemma-3-270M": ("Gemma3Text", "Gemma3", {"hidden_size": 640, "num_attention_heads": 4, "intermediate_size": 2048}),
}
"""Classes of the configuration and the model, and sizes; numbers of key heads and sizes of heads are below."""
HEADS: dict[str, dict[str, Any]] = {
    "the demo's": {"num_key_value_heads": 2, "head_dim": 24},
    "SmolLM2-135M": {"num_key_value_heads": 3},
    "Gemma-3-270M": {
        "num_key_value_heads": 1,
        "head_dim": 256,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def random_groups(num_groups: int, num_products: int, prefix: tuple[int, int], seed: int = 0) -> list[Group]:
    """Groups of random tokens, the shortest first, as a scorer orders them."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> list[int]:
        return rng.integers(1, VOCABULARY, rng.integers(low, high + 1)).tolist()

    groups = [Group(tokens(*prefix), [tokens(20, 40) for _ in range(num_products)]) for _ in range(num_groups)]
    return sorted(groups, key=lambda group: group.num_tokens)


WORKLOADS = {
    "12 products": random_groups(8, 12, (120, 200)),
    "100 products": random_groups(1, 100, (120, 200)),
    "1 product": random_groups(60, 1, (30, 80)),
}


def measure(name: str, path: Path, repeats: int) -> list[dict[str, Any]]:
    """A row for each workload."""
    config_class, model_class, sizes = SHAPES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{config_class}Config")(
        vocab_size=VOCABULARY, num_hidden_layers=2, tie_word_embeddings=True, pad_token_id=0, **sizes, **HEADS[name]
    )
    model = getattr(transformers, f"{model_class}ForCausalLM")(config)
    export_packed_graph(PackedRelevanceModel(model, [1, 2, 3, 4]).eval(), path)
    scorer, _ = load_pack_scorer(path, "cpu", threads=1)
    rows = []
    for workload, groups in WORKLOADS.items():
        packs = {size: list(build_packs(groups, size)) for size in SIZES}
        seconds: dict[int, list[float]] = {size: [] for size in SIZES}
        for _ in range(repeats):
            for size in SIZES:
                start = time.process_time()
                for pack in packs[size]:
                    scorer(pack)
                seconds[size].append(time.process_time() - start)
        num_pairs = sum(len(group.suffixes) for group in groups)
        times = {f"{size:,}": f"{1e3 * statistics.median(seconds[size]) / num_pairs:.2f}" for size in SIZES}
        rows.append({"shape of": name, "a query": workload, **times})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in SHAPES for row in measure(name, Path(folder) / "model.onnx", args.repeats)]
    print(markdown(rows))


if __name__ == "__main__":
    main()
