"""Pairs a second of a bundle's packs, against the same weights in length-sorted padded batches in torch.

    python tests/benchmarks/packs_against_padding.py --work build/esci_real_input

Uses the model, the bundle and the tables that esci_real_input.py left. Contenders take turns, so that what else the
machine does falls on both; their scores must agree, or the run is void.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from csrm.bundle import load_bundle, load_scorer
from csrm.config import InputSpec
from csrm.labels import expected_gain
from csrm.scoring import pair_groups
from csrm.training.data import JudgedInputs, JudgedPairs
from csrm.training.stage import load_trained

TOLERANCE = 1e-4
BATCH_SIZE = 32


def padded_scorer(model_dir: Path, bundle_dir: Path) -> Callable[[pd.DataFrame], np.ndarray]:
    """Scores by one padded prompt a pair, in batches of 32 sorted by length: what a cross-encoder library does."""
    model, _, card = load_trained(model_dir)
    tokenizer = load_bundle(bundle_dir).prompt_tokenizer()
    gains = np.array([label.gain for label in card.labels])

    def score(pairs: pd.DataFrame) -> np.ndarray:
        groups, rows = pair_groups(pairs, tokenizer)
        prompts = [[*group.prefix_ids, *suffix] for group in groups for suffix in group.suffixes]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        logits = np.empty((len(pairs), len(gains)), dtype=np.float32)
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            lengths = torch.tensor([len(prompts[index]) for index in batch])
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompts[index]) for index in batch], batch_first=True)
            mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
            with torch.inference_mode():
                hidden = model.language_model.get_decoder()(input_ids=ids, attention_mask=mask.long(), use_cache=False)
                last = hidden.last_hidden_state[torch.arange(len(batch)), lengths - 1]
                head = model.language_model.get_output_embeddings().weight[model.label_ids]
                logits[rows[batch]] = (last @ head.T).numpy()
        return expected_gain(logits, gains)

    return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/esci_real_input"), help="folder of esci_real_input.py")
    parser.add_argument("--pairs", type=int, default=192, help="pairs of whole queries to score each time")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    folders = {name: args.work / "inputs" / name for name in ("catalog", "queries", "judgments")}
    folders["retrieval_table"] = args.work / "tables" / "retrieval_table"
    inputs = JudgedInputs(**{name: InputSpec(path=str(folder)) for name, folder in folders.items()})
    with JudgedPairs(inputs, {"us": "en"}) as judged:
        pairs = judged.read("dev").head(args.pairs)
    packed = load_scorer(args.work / "bundle", "cpu")
    contenders = {
        "packs, ONNX Runtime": lambda: packed.score(pairs)["relevance_score"].to_numpy(),
        "padded batches, torch": (lambda score: lambda: score(pairs))(
            padded_scorer(args.work / "model", args.work / "bundle")
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    scores = {}
    for _ in range(args.repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            scores[name] = run()
            seconds[name].append(time.perf_counter() - start)
    difference = float(np.abs(np.subtract(*scores.values())).max())
    if difference > TOLERANCE:
        raise SystemExit(f"void: scores differ by {difference:.1e}, allowed {TOLERANCE:.0e}")
    rates = {name: len(pairs) / statistics.median(values) for name, values in seconds.items()}
    num_queries = pairs["query_id"].nunique()
    print(f"{len(pairs)} pairs, {num_queries} queries, {args.repeats} repeats, {torch.get_num_threads()} threads")
    for name, rate in rates.items():
        print(f"{name}: {rate:.1f} pairs/s (median; {min(seconds[name]):.1f} to {max(seconds[name]):.1f} s)")
    first, second = rates.values()
    print(f"ratio {first / second:.2f}; largest difference of scores {difference:.1e}")


if __name__ == "__main__":
    main()
