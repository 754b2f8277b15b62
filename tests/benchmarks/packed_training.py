"""Pairs a second of training with packs, against the same weights in length-sorted padded batches.

    python tests/benchmarks/packed_training.py --model FOLDER/gemma-3-270m --data FOLDER/esci_us

A pair is a query with three retrieved titles and a product's title, twelve pairs a query. Both contenders take the same
optimiser steps: same weights and adapters, same pairs in each step, as many tokens in each forward pass. The padded
contender sends one prompt a pair through the decoder as it is, with torch's scaled-dot-product attention; it too
computes the labels' logits at the last token only, not those of the whole vocabulary. Each runs in a process of its
own, which gives its memory, and they take turns. Where the machine is busy, seconds of processor say more than seconds.
With `--precision bf16` both multiply matrices by autocast.
Their losses must agree in the first step, or the run is void.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import bm25s
import pandas as pd
import torch
from peft import LoraConfig, get_peft_model

from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.packing import Group, build_packs
from csrm.scoring.prompts import Product, Query
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.model.base import BaseModel, load_language_model
from csrm.training.model.relevance import PackedRelevanceModel
from csrm.training.tuning import Tuning

PAIRS_PER_QUERY = 12
TITLES_PER_QUERY = 3
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
CONTENDERS = ("packs", "padded batches")
SECONDS = ("seconds", "cpu_seconds")

Losses = Callable[[Sequence[Group], torch.Tensor], Iterator[torch.Tensor]]
"""Of groups and their one-hot targets, in order of their pairs: each forward pass's part of the mean loss."""


def judged_groups(data: Path, tokenizer: PromptTokenizer, num_queries: int) -> tuple[list[Group], torch.Tensor]:
    """A group for each of the first queries, and the one-hot targets of all their pairs."""
    products = pd.read_parquet(data / "products.parquet", columns=["product_id", "title"])
    judgments = pd.read_csv(data / "judgments.tsv.gz", sep="\t", quoting=3, keep_default_na=False)
    judged = judgments[judgments["split"] == "train"].merge(products, on="product_id", how="inner")
    judged = judged.groupby("query_id").filter(lambda rows: len(rows) >= PAIRS_PER_QUERY)
    judged = judged.groupby("query_id").sample(PAIRS_PER_QUERY, random_state=0)
    judged = judged[judged["query_id"].isin(judged["query_id"].unique()[:num_queries])]
    queries = judged.drop_duplicates("query_id")["query"].tolist()

    index = bm25s.BM25()
    index.index(bm25s.tokenize(products["title"].tolist(), show_progress=False), show_progress=False)
    found, _ = index.retrieve(bm25s.tokenize(queries, show_progress=False), k=TITLES_PER_QUERY, show_progress=False)
    prefixes = tokenizer.prefix_ids(
        [
            Query("us", "en", query, tuple(products["title"].iloc[rows]))
            for query, rows in zip(queries, found, strict=True)
        ]
    )
    suffixes = tokenizer.suffix_ids([Product(title) for title in judged["title"]])
    groups = [
        Group(prefix, suffixes[number * PAIRS_PER_QUERY : (number + 1) * PAIRS_PER_QUERY])
        for number, prefix in enumerate(prefixes)
    ]
    numbers = judged["label"].map({label.name: number for number, label in enumerate(ESCI_LABELS)})
    return groups, torch.nn.functional.one_hot(torch.tensor(numbers.to_list()), len(ESCI_LABELS)).float()


def packed_losses(model: PackedRelevanceModel, batch_tokens: int) -> Losses:
    """The model's own loss over packs."""

    def losses(groups: Sequence[Group], targets: torch.Tensor) -> Iterator[torch.Tensor]:
        first = 0
        for pack in build_packs(groups, batch_tokens):
            inputs = {name: torch.from_numpy(array) for name, array in pack._asdict().items()}
            own = targets[first : first + len(pack.last_index)]
            first += len(own)
            yield model(**inputs, targets=own)["loss"] * len(own) / len(targets)

    return losses


def padded_losses(model: PackedRelevanceModel, batch_tokens: int) -> Losses:
    """One prompt a pair, sorted by length, padded to the longest of its batch."""

    def losses(groups: Sequence[Group], targets: torch.Tensor) -> Iterator[torch.Tensor]:
        prompts = [torch.tensor([*group.prefix_ids, *suffix]) for group in groups for suffix in group.suffixes]
        for rows in padded_batches([len(prompt) for prompt in prompts], batch_tokens):
            lengths = torch.tensor([len(prompts[row]) for row in rows])
            ids = torch.nn.utils.rnn.pad_sequence([prompts[row] for row in rows], batch_first=True)
            mask = (torch.arange(ids.shape[1])[None, :] < lengths[:, None]).long()
            decoder = model.language_model.get_decoder()
            hidden = decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            logits = (hidden[torch.arange(len(rows)), lengths - 1] @ model.label_rows().T).float()
            yield torch.nn.functional.cross_entropy(logits, targets[rows], reduction="sum") / len(targets)

    return losses


def padded_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Rows by length, as many at a time as have batch_tokens tokens with their padding."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[row] > batch_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def take_steps(args: argparse.Namespace) -> None:
    """One contender: takes the next optimiser step for each line of standard input, and prints what it cost."""
    tokenizer = PromptTokenizer.from_file(args.model / "tokenizer.json", Budgets())
    groups, targets = judged_groups(args.data, tokenizer, args.repeats * args.queries)
    tuning = Tuning()
    torch.manual_seed(tuning.seed)
    adapters = LoraConfig(
        r=tuning.lora_rank, lora_alpha=tuning.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    language_model = get_peft_model(load_language_model(BaseModel(folder=str(args.model))), adapters)
    model = PackedRelevanceModel(language_model, tokenizer.label_ids(ESCI_LABELS)).train()
    losses = (
        packed_losses(model, args.batch_tokens)
        if args.contender == CONTENDERS[0]
        else padded_losses(model, args.batch_tokens)
    )
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=tuning.learning_rate
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for step, _ in enumerate(sys.stdin):
        first = step * args.queries
        pairs = slice(first * PAIRS_PER_QUERY, (first + args.queries) * PAIRS_PER_QUERY)
        start, start_cpu = time.perf_counter(), time.process_time()
        total = 0.0
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            for loss in losses(groups[first : first + args.queries], targets[pairs]):
                loss.backward()
                total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        cost = {
            "loss": total,
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - start_cpu,
            "before_mib": before,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(cost), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a base model with its tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="folder with judgments.tsv.gz and products.parquet")
    parser.add_argument("--repeats", type=int, default=3, help="optimiser steps of each contender")
    parser.add_argument("--queries", type=int, default=2, help=f"queries a step, {PAIRS_PER_QUERY} pairs each")
    parser.add_argument("--batch-tokens", type=int, default=512, help="tokens of a forward pass, with padding")
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32")
    parser.add_argument("--contender", choices=CONTENDERS, help="take steps as this one, for each line of input")
    args = parser.parse_args()
    if args.contender:
        take_steps(args)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--contender"]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in CONTENDERS
    ]
    steps: list[dict[str, dict[str, float]]] = []
    try:
        for _ in range(args.repeats):
            costs = {}
            for name, process in zip(CONTENDERS, processes, strict=True):
                assert process.stdin
                assert process.stdout
                print(file=process.stdin, flush=True)
                costs[name] = json.loads(process.stdout.readline())
            steps.append(costs)
            shown = (
                f"{name} {cost['seconds']:.1f} s ({cost['cpu_seconds']:.1f} s of processor), loss {cost['loss']:.6f}"
                for name, cost in costs.items()
            )
            print("; ".join(shown), flush=True)
            packs, padded = (cost["loss"] for cost in costs.values())
            if len(steps) == 1 and abs(packs - padded) > TOLERANCE[args.precision] * abs(padded):
                raise SystemExit(f"void: losses of the first step are {packs} and {padded}")
    finally:
        for process in processes:
            process.communicate()
    num_pairs = args.queries * PAIRS_PER_QUERY
    print(f"{num_pairs} pairs a step, medians of {args.repeats} steps, {torch.get_num_threads()} threads")
    for name in CONTENDERS:
        seconds, cpu_seconds = (statistics.median(costs[name][key] for costs in steps) for key in SECONDS)
        last = steps[-1][name]
        print(
            f"{name}: {num_pairs / seconds:.2f} pairs/s, {num_pairs / cpu_seconds:.2f} a second of processor; "
            f"peak {last['peak_mib']:,.0f} MiB ({last['before_mib']:,.0f} MiB with the model loaded)"
        )
    for key in SECONDS:
        ratios = [costs[CONTENDERS[1]][key] / costs[CONTENDERS[0]][key] for costs in steps]
        print(
            f"ratio by {key}: {statistics.median(ratios):.2f} (median of steps, {min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
