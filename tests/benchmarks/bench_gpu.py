"""Pairs a second on one GPU: packs in ONNX Runtime against padded batches in torch, without and with prefix caching.

    python tests/benchmarks/bench_gpu.py                                    # a machine with a CUDA device; some minutes
    python tests/benchmarks/bench_gpu.py --data FOLDER_OF_REAL_TEXT
    python tests/benchmarks/bench_gpu.py --device cpu --tiny --torch-precision fp32    # to try the benchmark itself

It needs csrm[gpu,export] and nothing from the network: the model is made on the spot, seeded, of the shape of
Qwen3-0.6B with a small vocabulary (0.47 billion weights, of which 0.44 in the layers), and exported by the repository's
exporter. Exit code 2 where there is no CUDA device. Graphs are kept in the work folder and made again when the code
changes.

The same weights, pairs and device for all, each contender in a process of its own, one after the other; it scores the
workload once to warm up and to be checked, then --repeats times, then measures the matrix products of the device. Ours
starts from texts; what runs in torch gets token ids, so it is spared tokenising.

    ours-fp32, ours-fp16   PairScorer: packs in ONNX Runtime
    torch-packs            the same packs in torch, in bf16
    torch-padded           batches of prompts sorted by length, in bf16, attention by sdpa
    torch-prefix           the same, but the prefixes of some queries first, and then their products after the prefixes'
                           keys and values, which are repeated for each product

A run is void, with exit code 1, where the scores of a contender do not correlate with those of ours-fp32. The share
of the limit is that of the products with the layers' weights, for each token that had to be computed: padding and
attention are not counted; the limit is the fastest matrix product of the contender's precision on this device. Memory
is what the process took of the device (on a CPU: its largest resident size).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import MIN_CORRELATION, machine
from speed_inputs import (
    REPOSITORY,
    SEEDED_MODELS,
    Workload,
    code_digest,
    draw_pairs,
    read_texts,
    seeded_language_model,
)
from speed_report import Spread, markdown
from torch import nn
from transformers import DynamicCache

from csrm.bundle.contents import TOKENIZER_NAME
from csrm.bundle.loading import TOKENS_PER_CALL
from csrm.errors import CsrmError
from csrm.scoring.labels import ESCI_LABELS, expected_gain
from csrm.scoring.packing import Group
from csrm.scoring.runtime import load_pack_scorer, require_device
from csrm.scoring.scorer import PackScorer, PairScorer, pair_groups
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer

SHAPES = {
    "half": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32_768,
    },
    "tiny": SEEDED_MODELS["tiny"],
}
TOKENIZER = REPOSITORY / "conf" / "demo_bundle" / TOKENIZER_NAME
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
MATMUL_SECONDS = 1.0
TARGETS = (("ours-fp16", "torch-padded", 2.0),)
LEAST_SHARE = 0.5
"""Of the limit, for ours-fp16."""
CODE = ("csrm/**/*.py", "tests/benchmarks/bench_gpu.py")

Run = Callable[[], tuple[np.ndarray, int]]
"""Scores of the workload's pairs, shape (num_pairs,), and the tokens that had to be computed, without padding."""


class Contender:
    """The model in one form, and the workload."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.tokenizer = PromptTokenizer.from_file(TOKENIZER, Budgets())
        self.gains = np.array([label.gain for label in ESCI_LABELS])
        workload = Workload(args.products_per_query, ("us", "kr", "tw"))
        self.pairs = draw_pairs(read_texts(args.data), workload, args.pairs)
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.torch_precision]

    def packs(self, pack_scorer: PackScorer) -> Run:
        args = self.args
        scorer = PairScorer(
            self.tokenizer,
            ESCI_LABELS,
            pack_scorer=pack_scorer,
            tokens_per_call=args.tokens_per_call,
        )

        def run() -> tuple[np.ndarray, int]:
            before = scorer.num_tokens
            scores = scorer.score(self.pairs)["relevance_score"].to_numpy()
            return scores, scorer.num_tokens - before

        return run

    def ours(self, precision: str) -> Run:
        path = self.args.work / self.args.shape / precision / "model.onnx"
        return self.packs(load_pack_scorer(path, self.args.device)[0])

    def torch_model(self) -> PackedRelevanceModel:
        language_model = seeded_language_model(SHAPES[self.args.shape])
        frequencies = language_model.model.rotary_emb.inv_freq.to(self.device)
        language_model = language_model.to(self.device, self.dtype)
        language_model.model.rotary_emb.inv_freq = frequencies  # in bf16 they would move the tokens
        return PackedRelevanceModel(language_model, self.tokenizer.label_ids(ESCI_LABELS)).eval().to(self.device)

    def torch_packs(self) -> Run:
        return self.packs(torch_pack_scorer(self.torch_model()))

    def groups(self) -> tuple[list[Group], np.ndarray]:
        return pair_groups(self.pairs, self.tokenizer)

    def scores(self, model: PackedRelevanceModel, hidden: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        """Of prompts or suffixes, from the hidden state of the last token of each; padding is on the right."""
        last = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        return expected_gain((last.float() @ model.label_rows().float().T).cpu().numpy(), self.gains)

    def torch_padded(self) -> Run:
        model, (groups, rows) = self.torch_model(), self.groups()
        decoder = model.language_model.get_decoder()
        prompts = [[*group.prefix_ids, *suffix] for group in groups for suffix in group.suffixes]
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")

        @torch.inference_mode()
        def run() -> tuple[np.ndarray, int]:
            scores = np.empty(len(rows), dtype=np.float32)
            for start in range(0, len(order), self.args.batch):
                batch = order[start : start + self.args.batch]
                ids, mask = padded([prompts[place] for place in batch], self.device)
                hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                scores[rows[batch]] = self.scores(model, hidden, mask)
            return scores, sum(map(len, prompts))

        return run

    def torch_prefix(self) -> Run:
        model, (groups, rows) = self.torch_model(), self.groups()
        decoder = model.language_model.get_decoder()
        num_products = max(len(group.suffixes) for group in groups)
        step = max(1, self.args.batch // num_products)
        num_tokens = sum(len(group.prefix_ids) + sum(map(len, group.suffixes)) for group in groups)

        @torch.inference_mode()
        def run() -> tuple[np.ndarray, int]:
            scores, done = np.empty(len(rows), dtype=np.float32), 0
            for start in range(0, len(groups), step):
                some = groups[start : start + step]
                ids, mask = padded([group.prefix_ids for group in some], self.device)
                cache = DynamicCache(config=model.config)
                decoder(input_ids=ids, attention_mask=mask, past_key_values=cache)
                places = torch.tensor(
                    [place for place, group in enumerate(some) for _ in group.suffixes], device=self.device
                )
                cache.batch_select_indices(places)
                suffixes = [suffix for group in some for suffix in group.suffixes]
                suffix_ids, suffix_mask = padded(suffixes, self.device)
                lengths = mask.sum(1)[places]
                hidden = decoder(
                    input_ids=suffix_ids,
                    attention_mask=torch.cat([mask[places], suffix_mask], dim=1),
                    position_ids=lengths[:, None] + torch.arange(suffix_ids.shape[1], device=self.device),
                    past_key_values=cache,
                ).last_hidden_state
                own = rows[done : done + len(suffixes)]
                scores[own] = self.scores(model, hidden, suffix_mask)
                done += len(suffixes)
            return scores, num_tokens

        return run


CONTENDERS: dict[str, Callable[[Contender], Run]] = {
    "ours-fp32": lambda contender: contender.ours("fp32"),
    "ours-fp16": lambda contender: contender.ours("fp16"),
    "torch-packs": Contender.torch_packs,
    "torch-padded": Contender.torch_padded,
    "torch-prefix": Contender.torch_prefix,
}


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, shape (rows, tokens), int64; padded on the right."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of the fastest product of two square matrices."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest, end = float("inf"), time.perf_counter() + MATMUL_SECONDS
    while time.perf_counter() < end:
        synchronise(device)
        start = time.perf_counter()
        torch.mm(left, right)
        synchronise(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory_in_use(device: torch.device) -> int:
    """Bytes of the device that are taken, by whatever process; on a CPU this process's largest resident size."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What one contender takes; in a process of its own."""
    device = torch.device(args.device)
    before = memory_in_use(device) if device.type == "cuda" else 0
    contender = Contender(args)
    run = CONTENDERS[name](contender)
    scores, num_tokens = run()
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    memory = memory_in_use(device) - before
    dtype = {"ours-fp32": torch.float32, "ours-fp16": torch.float16}.get(name, contender.dtype)
    return {
        "scores": scores.tolist(),
        "num_tokens": num_tokens,
        "seconds": seconds,
        "memory": memory,
        "matmul": matmul_rate(device, dtype),
    }


def prepare(folder: Path, shape: str) -> None:
    """The packed graphs of the seeded model: fp32 and fp16."""
    from csrm.export.half import fuse_norms, write_half
    from csrm.export.packed_onnx import export_packed_graph

    made_from = {"shape": SHAPES[shape], "code": code_digest(*CODE)}
    about = folder / "about.json"
    if about.exists() and json.loads(about.read_text(encoding="utf-8"))["made_from"] == made_from:
        return
    shutil.rmtree(folder, ignore_errors=True)
    paths = {name: folder / name / "model.onnx" for name in ("fp32", "fused", "fp16")}
    for path in paths.values():
        path.parent.mkdir(parents=True)
    language_model = seeded_language_model(SHAPES[shape])
    label_ids = PromptTokenizer.from_file(TOKENIZER, Budgets()).label_ids(ESCI_LABELS)
    export_packed_graph(PackedRelevanceModel(language_model, label_ids).eval(), paths["fp32"])
    fuse_norms(paths["fp32"], paths["fused"])
    write_half(paths["fused"], "fp16", paths["fp16"])
    shutil.rmtree(paths["fused"].parent)
    made = {"made_from": made_from, **sizes(language_model)}
    about.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def sizes(language_model: nn.Module) -> dict[str, int]:
    layers = [weight for layer in language_model.model.layers for weight in layer.parameters() if weight.ndim == 2]
    return {
        "num_parameters": sum(weight.numel() for weight in language_model.model.parameters()),
        "layer_weights": sum(weight.numel() for weight in layers),
    }


def report(results: dict[str, dict[str, Any]], about: dict[str, Any], args: argparse.Namespace) -> tuple[str, bool]:
    """Ratios and figures as Markdown, and whether all scores agree."""
    reference = np.array(results["ours-fp32"]["scores"])
    rates = {
        name: Spread.of([len(reference) / second for second in found["seconds"]]) for name, found in results.items()
    }
    shares = {
        name: 2.0 * about["layer_weights"] * found["num_tokens"] / len(reference) * rates[name].median / found["matmul"]
        for name, found in results.items()
    }
    rows, voids = [], []
    for name, found in results.items():
        difference = np.abs(np.array(found["scores"]) - reference)
        correlation = float(np.corrcoef(found["scores"], reference)[0, 1])
        if not correlation >= MIN_CORRELATION:
            voids.append(f"**Void: {name}: correlation with ours-fp32 is {correlation:.2f}**")
        rows.append(
            {
                "contender": name,
                "pairs/s": rates[name].text(1),
                ": torch-padded": f"{rates[name].median / rates['torch-padded'].median:.2f}",
                "tokens/s": f"{rates[name].median * found['num_tokens'] / len(reference):,.0f}",
                "tokens a pair": f"{found['num_tokens'] / len(reference):.1f}",
                "matmul, 10^12/s": f"{found['matmul'] / 1e12:,.2f}",
                "share": f"{shares[name]:.2f}",
                "memory, MiB": f"{found['memory'] / 2**20:,.0f}",
                "score difference, largest": f"{difference.max():.1e}",
                "mean": f"{difference.mean():.1e}",
                "correlation": f"{correlation:.4f}",
            }
        )
    targets = [(f"{fast} : {slow}", rates[fast].median / rates[slow].median, least) for fast, slow, least in TARGETS]
    targets.append(("ours-fp16: share of the limit", shares["ours-fp16"], LEAST_SHARE))
    lines = [
        f"- {what}: {found:.2f}, target {least:g}{'' if found >= least else ', missed'}"
        for what, found, least in targets
    ]
    made_by = machine(os.cpu_count() or 1)
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else made_by["processor"]
    head = (
        f"`tests/benchmarks/bench_gpu.py`, {made_by['date']}, commit {made_by['commit']}, {device}: "
        f"{about['num_parameters'] / 1e6:,.1f} M weights, {about['layer_weights'] / 1e6:,.1f} M in the layers; "
        f"{len(reference):,} pairs, {args.products_per_query} products a query; "
        f"calls of {args.tokens_per_call:,} tokens; batches of {args.batch}; torch in {args.torch_precision}; "
        f"medians of {args.repeats} runs, with the smallest and the largest. torch {torch.__version__}, "
        f"onnxruntime {made_by['versions']['onnxruntime']}."
    )
    return "\n\n".join([head, *voids, "\n".join(lines), markdown(rows)]), not voids


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<number>, or cpu to try the benchmark")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, to try the benchmark")
    parser.add_argument("--torch-precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--data", type=Path, help="folder of real text (speed_inputs.py); else of the generated market")
    parser.add_argument("--pairs", type=int, default=12_000, help="about; a query is never cut")
    parser.add_argument("--products-per-query", type=int, default=12)
    parser.add_argument("--tokens-per-call", type=int, default=TOKENS_PER_CALL["cuda"], help="of a pack")
    parser.add_argument("--batch", type=int, default=256, help="prompts of a padded batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "bench_gpu", help="where graphs are kept")
    parser.add_argument("--contender", choices=list(CONTENDERS), help="measure it in this process, and print JSON")
    args = parser.parse_args(argv)
    args.shape, args.work = "tiny" if args.tiny else "half", args.work.resolve()
    return args


def main() -> int:
    args = parse_args()
    if args.contender:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not stand beside the answer
        print(json.dumps(measure(args.contender, args)), file=answers, flush=True)
        return 0
    try:
        require_device(args.device)
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise CsrmError(f"device {args.device!r}: torch {torch.__version__} finds no CUDA device.")
    except CsrmError as error:
        print(f"bench_gpu needs a CUDA device: {error}", file=sys.stderr)
        return 2
    os.environ |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    prepare(args.work / args.shape, args.shape)
    about = json.loads((args.work / args.shape / "about.json").read_text(encoding="utf-8"))
    results = {}
    for name in CONTENDERS:
        print(f"-- {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--contender", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout)
        seconds = float(np.median(results[name]["seconds"]))
        print(f"   {len(results[name]['scores']) / seconds:,.1f} pairs/s", file=sys.stderr, flush=True)
    text, all_agree = report(results, about, args)
    print(text)
    return 0 if all_agree else 1


if __name__ == "__main__":
    sys.exit(main())
