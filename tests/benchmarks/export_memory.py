"""Memory, time and size of an export of a large model to 16 bits, on a machine that could not hold the model.

    python tests/benchmarks/export_memory.py                        # Qwen3-4B's shape: 36 layers, 4.0 billion weights
    python tests/benchmarks/export_memory.py --layers 2             # 0.6 billion, most of them embeddings
    python tests/benchmarks/export_memory.py --layers 2 --hidden-size 64 --precision bf16

A seeded model is written as bfloat16 safetensors, tensor by tensor, with low-rank adapters beside it: a trained folder.
Its residual stream is as loud as that of a real model: norms read hundreds to thousands. Two processes follow:

- export: adapters are merged, torch scores pairs one layer at a time, the fp32 graph is written, its norms are fused,
  and its weights are rounded to 16 bits. Its largest resident size must stay below twice the largest tensor in float32
  and 3 GB. Exit code 1 where it does not.
- check: ONNX Runtime computes the same pairs by the finished graph, with no optimisation, which would widen all weights
  to float32 at once; it takes a fifth more than the graph's size. The largest error of a label logit, as a share of the
  range of all, must be as in half_precision.py. A CPU has no products in bfloat16: those of --precision bf16 go through
  write_rounded.

The work folder needs 10 bytes a weight: the model, the fp32 graph, which is deleted, and the bundle's.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from half_precision import LIMITS, pairs
from safetensors.torch import save_file
from speed_report import markdown
from transformers import Qwen3Config

from csrm.artefacts.manifest import MODEL_NAME, TOKENIZER_NAME, file_digest, write_manifest
from csrm.bundle.golden import choose_golden_pairs
from csrm.export.bundle import torch_scorer
from csrm.export.graph_files import graph_files
from csrm.export.half import fuse_norms, write_half, write_rounded
from csrm.export.packed_onnx import export_packed_graph
from csrm.export.streamed import empty_language_model
from csrm.export.weights import TrainedWeights
from csrm.scoring.labels import ESCI_LABELS, expected_gain
from csrm.scoring.packing import lay_out
from csrm.scoring.scorer import pair_groups
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.model.weight_files import INDEX_NAME
from csrm.training.trained import MODEL_KIND, ModelCard, read_card

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "conf" / "demo_bundle" / TOKENIZER_NAME
ROOM_GB = 3.0
"""What a process may take beside twice the largest tensor in float32."""
RESIDUAL = 200.0
"""Standard deviation of the embeddings, and of what a layer adds to them."""
RANK = 16


def config_of(args: argparse.Namespace) -> Qwen3Config:
    hidden = args.hidden_size
    return Qwen3Config(
        vocab_size=151_936 if hidden >= 1024 else 32_768,
        hidden_size=hidden,
        intermediate_size=int(3.8 * hidden),
        num_hidden_layers=args.layers,
        num_attention_heads=max(2, 32 * hidden // 2560),
        num_key_value_heads=max(1, 8 * hidden // 2560),
        head_dim=128 if hidden >= 1024 else 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )


def write_model(folder: Path, args: argparse.Namespace) -> None:
    """A trained folder with adapters, and the base model that they belong to; one tensor in memory at a time."""
    base, trained = folder / "base", folder / "trained"
    base.mkdir(parents=True)
    (trained / "weights").mkdir(parents=True)
    config = config_of(args)
    config.save_pretrained(base)
    random = torch.Generator().manual_seed(0)
    places, adapters = {}, {}
    for number, (name, empty) in enumerate(empty_language_model(config).named_parameters()):
        weight = torch.ones(empty.shape) if empty.ndim == 1 else torch.randn(empty.shape, generator=random)
        if "embed_tokens" in name:
            weight *= RESIDUAL
        elif empty.ndim == 2:
            adds = "o_proj" in name or "down_proj" in name
            weight *= (RESIDUAL if adds else 1.0) / empty.shape[1] ** 0.5
            module = f"base_model.model.{name.removesuffix('.weight')}"
            for part, shape in (("lora_A", (RANK, empty.shape[1])), ("lora_B", (empty.shape[0], RANK))):
                scale = 0.1 * (RESIDUAL if adds and part == "lora_B" else 1.0) / shape[1] ** 0.5
                adapters[f"{module}.{part}.weight"] = torch.randn(shape, generator=random) * scale
        elif name == "model.norm.weight":
            weight *= 2 / (RESIDUAL * config.hidden_size**0.5)  # logits with a standard deviation of about 2
        places[name] = f"model-{number:05}.safetensors"
        save_file({name: weight.bfloat16()}, base / places[name])
    (base / INDEX_NAME).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    save_file(adapters, trained / "weights" / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-3] for name in adapters})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": targets,
    }
    (trained / "weights" / "adapter_config.json").write_text(json.dumps(about), encoding="utf-8")
    shutil.copyfile(TOKENIZER, trained / TOKENIZER_NAME)
    card = ModelCard(
        base_model={"folder": str(base)},
        base_model_files={path.name: file_digest(path) for path in sorted(base.iterdir())},
        tuning={"method": "lora"},
        labels=ESCI_LABELS,
        budgets=Budgets(),
        pack_tokens=512,
        num_packs=1,
        loss=0.0,
        fingerprint="",
        versions={},
    )
    (trained / "model.json").write_text(json.dumps(asdict(card)), encoding="utf-8")
    write_manifest(trained, MODEL_KIND)


def export(folder: Path, precision: str) -> dict[str, Any]:
    """Make what a bundle holds of the model; in a process of its own."""
    bundle, seconds = folder / "bundle", {}
    bundle.mkdir()
    start = time.monotonic()

    def lap(step: str) -> None:
        nonlocal start
        seconds[step], start = time.monotonic() - start, time.monotonic()
        print(f"   {step}: {seconds[step]:.0f} s", file=sys.stderr, flush=True)

    card = read_card(folder / "trained")
    weights = TrainedWeights(folder / "trained", card)
    lap("digests")
    tokenizer = PromptTokenizer.from_file(folder / "trained" / TOKENIZER_NAME, card.budgets)
    model = weights.merged_model(tokenizer.label_ids(card.labels))
    logits = torch_scorer(model, tokenizer, card.labels, "torch").logits(pairs())
    scores = expected_gain(logits, np.array([label.gain for label in card.labels]))
    choose_golden_pairs(pairs(), scores, tokenizer, f"torch {torch.__version__}").write(bundle / "golden.json")
    shutil.copyfile(folder / "trained" / TOKENIZER_NAME, bundle / TOKENIZER_NAME)
    lap("torch")
    export_packed_graph(model, folder / "fp32.onnx")
    lap("fp32 graph")
    fuse_norms(folder / "fp32.onnx", folder / "fused.onnx")
    lap("fused")
    write_half(folder / "fused.onnx", precision, bundle / MODEL_NAME)
    lap(precision)
    return {
        "seconds": seconds,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "logits": logits.tolist(),
        "num_bytes": sum(path.stat().st_size for path in bundle.iterdir()),
        "largest": max(weight.numel() for _, weight in empty_language_model(weights.config).named_parameters()),
        "parameters": sum(weight.numel() for _, weight in empty_language_model(weights.config).named_parameters()),
    }


def check(folder: Path, precision: str) -> dict[str, Any]:
    """Label logits of the finished graph, by ONNX Runtime on the CPU."""
    import onnxruntime

    path = folder / "bundle" / MODEL_NAME
    if precision == "bf16":
        write_rounded(path, folder / "rounded.onnx")
        path = folder / "rounded.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    tokenizer = PromptTokenizer.from_file(TOKENIZER, Budgets())
    groups, rows = pair_groups(pairs(), tokenizer)
    found = session.run(["logits"], lay_out(groups)._asdict())[0]
    logits = np.empty_like(found)
    logits[rows] = found
    return {"logits": logits.tolist()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--hidden-size", type=int, default=2560, help="a multiple of 64")
    parser.add_argument("--precision", choices=list(LIMITS), default="fp16")
    parser.add_argument("--work", type=Path, help="folder on a disk with room; else the system's for temporary files")
    parser.add_argument("--part", choices=("export", "check"), help="run it in this process, on the work folder")
    args = parser.parse_args()
    if args.part:
        print(json.dumps({"export": export, "check": check}[args.part](args.work, args.precision)))
        return 0
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        write_model(folder, args)
        made = in_a_process("export", folder, args.precision)
        for path in graph_files(folder / "fp32.onnx"):
            path.unlink()
        found = np.array(in_a_process("check", folder, args.precision)["logits"])
    expected = np.array(made["logits"])
    error = float(np.abs(found - expected).max() / np.ptp(expected))
    limit = 2 * 4 * made["largest"] + ROOM_GB * 1e9
    row = {
        "weights": f"{made['parameters'] / 1e9:.2f} billion",
        "precision": args.precision,
        "seconds": f"{sum(made['seconds'].values()):.0f}",
        "of them": ", ".join(f"{step} {taken:.0f}" for step, taken in made["seconds"].items()),
        "peak, GB": f"{made['peak'] / 1e9:.2f}",
        "limit, GB": f"{limit / 1e9:.2f}",
        "bundle, GB": f"{made['num_bytes'] / 1e9:.2f}",
        "range of logits": f"{np.ptp(expected):.2f}",
        "largest error, share": f"{error:.4f}",
    }
    print(markdown([row]))
    return 0 if made["peak"] <= limit and error <= LIMITS[args.precision] else 1


def in_a_process(part: str, folder: Path, precision: str) -> dict[str, Any]:
    print(f"-- {part}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--part", part, "--work", str(folder), "--precision", precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
