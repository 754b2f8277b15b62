"""One GPU in 15 minutes: what a layer and a call cost, and a whole model in ONNX Runtime against torch.

    python tests/benchmarks/bench_gpu.py --structures      # before, on any machine: graphs without weights, in build/
    python tests/benchmarks/bench_gpu.py                   # a machine with a CUDA device; again: what is left
    python tests/benchmarks/bench_gpu.py --data FOLDER_OF_REAL_TEXT
    python tests/benchmarks/bench_gpu.py --device cpu --tiny --torch-precision fp32    # to try the benchmark itself

It needs csrm[gpu,export] and nothing from the network. Rows are measured one after the other, the most valuable first,
each in a process of its own that ends with --minutes. A row that is in the work folder's results.json, of the same
code, settings and device, is not measured again. Exit codes: 1 where scores disagree or tests fail, 2 where there is no
CUDA device, 3 where rows are left: run it again.

    slope-0.6b-fp16, ...    packs in ONNX Runtime, by graphs of 2 and 6 layers: the time of a layer, and what a call
                            costs beside its layers, at three lengths of a call; then the kernels of one call
    ours-fp16, ours-bf16    PairScorer: packs in ONNX Runtime, a whole model of 0.6 billion weights
    torch-padded            batches of prompts sorted by length, in bf16, attention by sdpa
    torch-prefix            the same, but the prefixes of some queries first, and then their products after the
                            prefixes' keys and values, which are repeated for each product
    tests                   pytest -m gpu
    ours-fp32, torch-packs  the fp32 graph; the same packs in torch, in bf16

Graphs of 2 and 6 layers are structures: their weights are random numbers that one file holds for all, made there in
seconds. The whole model is seeded, of the shape of Qwen3-0.6B with a small vocabulary (0.47 billion weights, of which
0.44 in the layers), and exported there by the repository's exporter: the same weights, pairs and device for all.
Contenders score the workload once to warm up and to be checked, then --repeats times. Ours starts from texts; what runs
in torch gets token ids, so it is spared tokenising.

A contender is void where its scores do not correlate with those of torch-padded. The share of the limit is that of the
products with the layers' weights, for each token that had to be computed: padding and attention are not counted; the
limit is the fastest matrix product of the row's precision on this device. Memory is what the process took of the device
(on a CPU: its largest resident size).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
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

from csrm.artefacts.manifest import TOKENIZER_NAME
from csrm.bundle.loading import TOKENS_PER_CALL
from csrm.errors import CsrmError
from csrm.scoring.labels import ESCI_LABELS, expected_gain
from csrm.scoring.packing import Group, Pack, lay_out
from csrm.scoring.runtime import load_pack_scorer, require_device
from csrm.scoring.scorer import PackScorer, PairScorer, pair_groups
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.model.relevance import PackedRelevanceModel, torch_pack_scorer

SHAPES = {
    "0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32_768,
    },
    "4b": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32_768,
    },
    "tiny": {**SEEDED_MODELS["tiny"], "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64},
}
SLOPE_LAYERS = (2, 6)
SLOPE_TOKENS = {"cuda": (512, 8_192, 32_768), "cpu": (512, 1_024, 2_048)}
SLOPE_VOCABULARY = 4_096
SLOPE_SECONDS = 2.0
"""Calls of one graph at one length take so long in all."""
PREDICTED_NS = {"0.6b": "164, 141", "4b": "527, 489"}
"""Nanoseconds of a layer for a token on an H100, by the model in RESULTS.md: rotary in parts as today, as one op."""
PREDICTED_PAIRS = {"torch-padded": "1,140", "ours-fp16": "5,030"}
"""Pairs a second of the whole model with 12 products a query, by the same model."""
TOKENIZER = REPOSITORY / "conf" / "demo_bundle" / TOKENIZER_NAME
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
MATMUL_SECONDS = 1.0
TARGETS = (("ours-fp16", "torch-padded", 3.0), ("ours-bf16", "torch-padded", 3.0))
LEAST_SHARE = {"0.6b": 0.30, "4b": 0.45, "tiny": 0.0}
"""Of the limit, for ours-fp16 and for a layer."""
REFERENCE = "torch-padded"
VOID = "**void**"
CODE = ("csrm/**/*.py", "tests/benchmarks/bench_gpu.py")
ROWS = (
    "slope-0.6b-fp16",
    "slope-4b-fp16",
    "ours-fp16",
    "torch-padded",
    "ours-bf16",
    "torch-prefix",
    "slope-0.6b-bf16",
    "slope-4b-bf16",
    "tests",
    "ours-fp32",
    "torch-packs",
)
"""The most valuable first."""
TINY_ROWS = ("slope-tiny-fp16", "ours-fp16", "torch-padded", "torch-prefix", "ours-fp32", "torch-packs")
"""What a CPU can try: it has no products in bfloat16."""
OWN_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

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
    "ours-bf16": lambda contender: contender.ours("bf16"),
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
    dtype = OWN_TYPES.get(name.removeprefix("ours-"), contender.dtype)
    return {
        "scores": scores.tolist(),
        "num_tokens": num_tokens,
        "seconds": seconds,
        "memory": memory,
        "matmul": matmul_rate(device, dtype),
    }


def prepare(folder: Path, shape: str) -> dict[str, int]:
    """The packed graphs of the seeded model, fp32, fp16 and bf16, where they are not there; returns its sizes."""
    from csrm.export.half import fuse_norms, write_half
    from csrm.export.packed_onnx import export_packed_graph

    made_from = {"shape": SHAPES[shape], "code": code_digest(*CODE)}
    about = folder / "about.json"
    if about.exists() and (known := json.loads(about.read_text(encoding="utf-8")))["made_from"] == made_from:
        return {name: known[name] for name in ("num_parameters", "layer_weights")}
    shutil.rmtree(folder, ignore_errors=True)
    paths = {name: folder / name / "model.onnx" for name in OWN_TYPES}
    for path in paths.values():
        path.parent.mkdir(parents=True)
    language_model = seeded_language_model(SHAPES[shape])
    label_ids = PromptTokenizer.from_file(TOKENIZER, Budgets()).label_ids(ESCI_LABELS)
    export_packed_graph(PackedRelevanceModel(language_model, label_ids).eval(), paths["fp32"])
    fused = paths["fp32"].with_name("fused.onnx")
    fuse_norms(paths["fp32"], fused)
    for precision in ("fp16", "bf16"):
        write_half(fused, precision, paths[precision])
    about.write_text(json.dumps({"made_from": made_from, **sizes(language_model)}, indent=2) + "\n", encoding="utf-8")
    return sizes(language_model)


def sizes(language_model: nn.Module) -> dict[str, int]:
    layers = [weight for layer in language_model.model.layers for weight in layer.parameters() if weight.ndim == 2]
    return {
        "num_parameters": sum(weight.numel() for weight in language_model.model.parameters()),
        "layer_weights": sum(weight.numel() for weight in layers),
    }


def write_structures(folder: Path, shapes: Sequence[str]) -> None:
    """Graphs of 2 and 6 layers without weights, where they are not there, or other code made them.

    Each matrix is the beginning of weights-PRECISION.bin, so all share its numbers.
    """
    from transformers import Qwen3Config

    from csrm.export.graph_files import GraphReader
    from csrm.export.half import HALF_TYPES, fuse_norms, write_half
    from csrm.export.packed_onnx import export_packed_graph
    from csrm.export.streamed import StreamedModel, empty_language_model
    from csrm.export.weights import Weights

    class Zeros(Weights):
        def __getitem__(self, name: str) -> torch.Tensor:
            return (torch.ones if "norm" in name else torch.zeros)(self._tensors[name].shape)

    made_by, code = folder / "code", code_digest(*CODE)
    if not made_by.exists() or made_by.read_text(encoding="utf-8") != code:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        made_by.write_text(code, encoding="utf-8")
    for shape in shapes:
        for layers in SLOPE_LAYERS:
            paths = {precision: structure_path(folder, shape, layers, precision) for precision in HALF_TYPES}
            if all(path.exists() for path in paths.values()):
                continue
            values = {**SHAPES[shape], "num_hidden_layers": layers, "vocab_size": SLOPE_VOCABULARY}
            language_model = empty_language_model(Qwen3Config(**values, tie_word_embeddings=True))
            rows = torch.randn(len(ESCI_LABELS), values["hidden_size"])
            weights = Zeros(dict(language_model.named_parameters()))
            model = StreamedModel(language_model, weights, rows, range(1, len(ESCI_LABELS) + 1))
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                fp32, fused, half = (Path(scratch) / f"{name}.onnx" for name in ("fp32", "fused", "half"))
                export_packed_graph(model, fp32)
                fuse_norms(fp32, fused)
                for precision, path in paths.items():
                    write_half(fused, precision, half)
                    graph_model = GraphReader(half).model
                    for tensor in graph_model.graph.initializer:
                        if len(tensor.dims) == 2 and tensor.data_type == HALF_TYPES[precision][0]:
                            share(tensor, f"weights-{precision}.bin")
                    path.write_bytes(graph_model.SerializeToString())


def share(tensor: Any, file_name: str) -> None:
    """Let a weight be the beginning of a file, which others are, too."""
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", file_name), ("offset", 0), ("length", 2 * int(np.prod(tensor.dims)))):
        tensor.external_data.add(key=key, value=str(value))


def structure_path(folder: Path, shape: str, layers: int, precision: str) -> Path:
    return folder / f"{shape}-{layers}-{precision}.onnx"


def measure_slope(shape: str, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a call, by layers and tokens, and the kernels of one."""
    device, folder, values = torch.device(args.device), args.work / "structures", SHAPES[shape]
    write_structures(folder, [shape])
    largest = values["hidden_size"] * max(values["intermediate_size"], SLOPE_VOCABULARY)
    random = torch.randn(largest, generator=torch.Generator().manual_seed(0)) * 0.02
    bits = random.to(OWN_TYPES[precision]).view(torch.int16).numpy()
    (folder / f"weights-{precision}.bin").write_bytes(bits.tobytes())
    packs = {tokens: slope_pack(tokens) for tokens in SLOPE_TOKENS[device.type]}
    milliseconds: dict[str, dict[str, float]] = {}
    for layers in SLOPE_LAYERS:
        scorer, _ = load_pack_scorer(structure_path(folder, shape, layers, precision), args.device)
        milliseconds[str(layers)] = {str(tokens): 1e3 * seconds_of(scorer, pack) for tokens, pack in packs.items()}
    middle = sorted(packs)[1]
    return {
        "milliseconds": milliseconds,
        "tokens": {str(tokens): len(pack.input_ids) for tokens, pack in packs.items()},
        "matmul": matmul_rate(device, OWN_TYPES[precision]),
        "layer_weights": layer_weights(shape),
        "kernels": kernels(structure_path(folder, shape, SLOPE_LAYERS[-1], precision), packs[middle], args.device),
        "kernel_tokens": len(packs[middle].input_ids),
    }


def layer_weights(shape: str) -> int:
    """Weights of the matrices of one layer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPES[shape], "num_hidden_layers": 1}))
    return sizes(model)["layer_weights"]


def slope_pack(num_tokens: int) -> Pack:
    """Random tokens: prefixes of 120 to 200, with 12 products of 20 to 40 each, up to about so many."""
    random = np.random.default_rng(0)

    def tokens(low: int, high: int) -> list[int]:
        return random.integers(1, SLOPE_VOCABULARY, random.integers(low, high + 1)).tolist()

    groups: list[Group] = []
    while sum(group.num_tokens for group in groups) < num_tokens - 250:
        groups.append(Group(tokens(120, 200), [tokens(20, 40) for _ in range(12)]))
    return lay_out(sorted(groups, key=lambda group: group.num_tokens))


def seconds_of(scorer: PackScorer, pack: Pack) -> float:
    """Median of a call, after two to warm up."""
    taken: list[float] = []
    scorer(pack)
    scorer(pack)
    end = time.perf_counter() + SLOPE_SECONDS
    while not taken or (time.perf_counter() < end and len(taken) < 100):
        start = time.perf_counter()
        scorer(pack)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def kernels(path: Path, pack: Pack, device: str) -> list[tuple[str, int, float]]:
    """Operators of one call with their provider, how often they ran, and their microseconds; the longest first."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=[require_device(device)])
        session.run(None, pack._asdict())
        session.run(None, pack._asdict())
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    found: dict[str, tuple[int, float]] = {}
    for event in runs[len(runs) // 2 :]:  # the second call
        name = f"{event['args']['op_name']} ({event['args']['provider'].removesuffix('ExecutionProvider')})"
        number, taken = found.get(name, (0, 0.0))
        found[name] = (number + 1, taken + float(event["dur"]))
    return sorted(((name, *value) for name, value in found.items()), key=lambda item: -item[2])[:12]


def run_tests() -> dict[str, Any]:
    """pytest -m gpu."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-n", "0", "tests/test_gpu.py"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, check=False
    )
    return {"code": done.returncode, "text": done.stdout[-4000:]}


def measure_row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in this process."""
    if name == "graphs":
        return prepare(args.work / args.shape, args.shape)
    if name == "tests":
        return run_tests()
    if name.startswith("slope-"):
        _, shape, precision = name.split("-")
        return measure_slope(shape, precision, args)
    return measure(name, args)


def slope_table(results: Mapping[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Of each slope and length: a layer, the rest of a call, and the share of the matrix product's rate."""
    rows = []
    for name, found in results.items():
        if not name.startswith("slope-"):
            continue
        _, shape, precision = name.split("-")
        for key, tokens in found["tokens"].items():
            few, many = (found["milliseconds"][str(layers)][key] for layers in SLOPE_LAYERS)
            layer = (many - few) / (SLOPE_LAYERS[1] - SLOPE_LAYERS[0])
            share_of_limit = 2.0 * found["layer_weights"] * tokens / (layer / 1e3) / found["matmul"]
            rows.append(
                {
                    "shape": shape,
                    "precision": precision,
                    "tokens a call": f"{tokens:,}",
                    "a layer, ms": f"{layer:.3f}",
                    "rest of a call, ms": f"{few - SLOPE_LAYERS[0] * layer:.3f}",
                    "ns a token and layer": f"{1e6 * layer / tokens:,.0f}",
                    "predicted, rotary in parts, as one op": PREDICTED_NS.get(shape, ""),
                    "matmul, 10^12/s": f"{found['matmul'] / 1e12:,.2f}",
                    "share": f"{share_of_limit:.2f}, target {LEAST_SHARE[shape]:g}",
                }
            )
    return rows


def kernel_table(results: Mapping[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The operators that one call of each slope spent most time in."""
    rows = []
    for name, found in results.items():
        if name.startswith("slope-"):
            lines = [f"{kernel} x {number}: {taken / 1e3:.2f} ms" for kernel, number, taken in found["kernels"]]
            call = f"{name}, {SLOPE_LAYERS[-1]} layers, {found['kernel_tokens']:,} tokens"
            rows.append({"one call of": call, "kernels": "; ".join(lines)})
    return rows


def contender_table(results: Mapping[str, dict[str, Any]], shape: str) -> tuple[list[dict[str, str]], list[str]]:
    """A row for each contender that was measured; then what is void, and the targets, a line each."""
    measured = {name: results[name] for name in CONTENDERS if name in results}
    reference = np.array(measured[REFERENCE]["scores"]) if REFERENCE in measured else None
    rates: dict[str, Spread] = {}
    shares: dict[str, float] = {}
    rows, lines = [], []
    for name, found in measured.items():
        num_pairs = len(found["scores"])
        tokens = found["num_tokens"] / num_pairs
        rates[name] = Spread.of([num_pairs / second for second in found["seconds"]])
        layers = SHAPES[shape]["num_hidden_layers"] * layer_weights(shape)
        shares[name] = 2.0 * layers * tokens * rates[name].median / found["matmul"]
        row = {
            "contender": name,
            "pairs/s": rates[name].text(1),
            "predicted": PREDICTED_PAIRS.get(name, "") if shape == "0.6b" else "",
            "tokens/s": f"{rates[name].median * tokens:,.0f}",
            "tokens a pair": f"{tokens:.1f}",
            "matmul, 10^12/s": f"{found['matmul'] / 1e12:,.2f}",
            "share": f"{shares[name]:.2f}",
            "memory, MiB": f"{found['memory'] / 2**20:,.0f}",
        }
        if reference is not None:
            difference = np.abs(np.array(found["scores"]) - reference)
            correlation = float(np.corrcoef(found["scores"], reference)[0, 1])
            if not correlation >= MIN_CORRELATION:
                lines.append(f"- {VOID}: {name}: correlation with {REFERENCE} is {correlation:.2f}")
            row |= {
                "score difference, largest": f"{difference.max():.1e}",
                "mean": f"{difference.mean():.1e}",
                "correlation": f"{correlation:.4f}",
            }
        rows.append(row)
    for fast, slow, least in TARGETS:
        if fast in rates and slow in rates:
            lines.append(target(f"{fast} : {slow}", rates[fast].median / rates[slow].median, least))
    if "ours-fp16" in shares:
        lines.append(target("ours-fp16: share of the limit", shares["ours-fp16"], LEAST_SHARE[shape]))
    return rows, lines


def target(what: str, found: float, least: float) -> str:
    return f"- {what}: {found:.2f}, target {least:g}{'' if found >= least else ', missed'}"


def report(results: Mapping[str, dict[str, Any]], left: Mapping[str, str], args: argparse.Namespace) -> str:
    """What is measured, and what is not, as Markdown."""
    made_by = machine(os.cpu_count() or 1)
    head = (
        f"`tests/benchmarks/bench_gpu.py`, {made_by['date']}, commit {made_by['commit']}, {device_name(args)}: "
        f"about {args.pairs:,} pairs, {args.products_per_query} products a query; "
        f"calls of {args.tokens_per_call:,} tokens; batches of {args.batch}; torch in {args.torch_precision}; "
        f"medians of {args.repeats} runs, with the smallest and the largest. torch {torch.__version__}, "
        f"onnxruntime {made_by['versions']['onnxruntime']}."
    )
    rows, lines = contender_table(results, args.shape)
    if "tests" in results:
        summary = " ".join(results["tests"]["text"].strip().splitlines()[-1:])
        word = f"{VOID}: " if results["tests"]["code"] else ""
        lines.append(f"- {word}pytest -m gpu: exit code {results['tests']['code']}, {summary}")
    lines += [f"- {name}: not run: {reason}" for name, reason in left.items()]
    tables = [markdown(table) for table in (slope_table(results), kernel_table(results), rows) if table]
    return "\n\n".join([head, *tables, "\n".join(lines)])


def device_name(args: argparse.Namespace) -> str:
    if args.device.startswith("cuda"):
        return str(torch.cuda.get_device_name())
    return str(machine(os.cpu_count() or 1)["processor"])


class Results:
    """Rows that were measured, in a file of the work folder. Those of other settings, code or devices are dropped."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path = args.work / "results.json"
        settings = {name: str(value) for name, value in vars(args).items() if name not in ("row", "minutes", "work")}
        self._key = {"settings": settings, "code": code_digest(*CODE), "device": device_name(args)}
        known = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        self.rows: dict[str, dict[str, Any]] = known["rows"] if known.get("key") == self._key else {}

    def add(self, name: str, found: dict[str, Any]) -> None:
        self.rows[name] = found
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"key": self._key, "rows": self.rows}), encoding="utf-8")
        unfinished.replace(self._path)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<number>, or cpu to try the benchmark")
    parser.add_argument("--tiny", action="store_true", help="models of two and six small layers, to try the benchmark")
    parser.add_argument("--torch-precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--data", type=Path, help="folder of real text (speed_inputs.py); else of the generated market")
    parser.add_argument("--pairs", type=int, default=12_000, help="about; a query is never cut")
    parser.add_argument("--products-per-query", type=int, default=12)
    parser.add_argument("--tokens-per-call", type=int, default=TOKENS_PER_CALL["cuda"], help="of a pack")
    parser.add_argument("--batch", type=int, default=256, help="prompts of a padded batch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=12.0, help="rows that would go on longer are left")
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "bench_gpu", help="graphs and results")
    parser.add_argument("--structures", action="store_true", help="make the graphs of 2 and 6 layers, and end")
    parser.add_argument("--row", choices=["graphs", *ROWS, *TINY_ROWS[:1]], help="measure it here, and print JSON")
    args = parser.parse_args(argv)
    args.shape, args.work = "tiny" if args.tiny else "0.6b", args.work.resolve()
    return args


def main() -> int:
    args = parse_args()
    if args.row:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not stand beside the answer
        print(json.dumps(measure_row(args.row, args)), file=answers, flush=True)
        return 0
    if args.structures:
        write_structures(args.work / "structures", ["tiny"] if args.tiny else ["0.6b", "4b"])
        return 0
    end = time.monotonic() + 60 * args.minutes
    try:
        require_device(args.device)
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise CsrmError(f"device {args.device!r}: torch {torch.__version__} finds no CUDA device.")
    except CsrmError as error:
        print(f"bench_gpu needs a CUDA device: {error}", file=sys.stderr)
        return 2
    os.environ |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    args.work.mkdir(parents=True, exist_ok=True)
    results, left, has_graphs = Results(args), {}, False
    for name in TINY_ROWS if args.tiny else ROWS:
        if name in results.rows:
            print(f"-- {name}: measured before", file=sys.stderr, flush=True)
            continue
        reason = ""
        if name.startswith("ours-") and not has_graphs:
            reason = run_row("graphs", results, end)
            has_graphs = not reason
        if reason := reason or run_row(name, results, end):
            left[name] = reason
            print(f"   {reason}", file=sys.stderr, flush=True)
    text = report(results.rows, left, args)
    (args.work / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if VOID in text else 3 if left else 0


def run_row(name: str, results: Results, end: float) -> str:
    """Measure a row in a process of its own; returns why it is left, else nothing."""
    if (seconds := end - time.monotonic()) < 1:
        return "no time was left"
    print(f"-- {name}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--row", name]
    start = time.monotonic()
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"it was stopped after {seconds:.0f} s"
    except subprocess.CalledProcessError as error:
        return f"it ended with exit code {error.returncode}"
    results.add(name, json.loads(done.stdout))
    print(f"   {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return ""


if __name__ == "__main__":
    sys.exit(main())
