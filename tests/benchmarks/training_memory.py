"""Memory and time of preparing training data: tables of generated pairs to packs on disk.

    python tests/benchmarks/training_memory.py
    python tests/benchmarks/training_memory.py --random-negatives 0.5 --soft-labels

Sizes are 100,000, 300,000 and 1,000,000 judged pairs, each in a process of its own; prints seconds to open the tables,
pairs a second with that time and what the process took above what it had before. Neither should change with the pairs.
"""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from csrm.config import InputSpec
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.tokenization import Budgets, PromptTokenizer
from csrm.training.data.judged import JudgedInputs, JudgedPairs
from csrm.training.data.packs import judged_packs, write_packs
from csrm.training.targets import one_hot_targets

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer.json"
PRODUCTS_PER_QUERY = 20
TITLES_PER_QUERY = 5
ROWS_AT_ONCE = 100_000
WORDS = np.array(
    ["wireless", "mouse", "towel", "cotton", "캠핑", "텐트", "무선", "毛巾", "露營", "手機殼", "XL", "240mm"]
)


def write_tables(folder: Path, num_pairs: int) -> None:
    """As many products as pairs, 20 products and 5 retrieved titles to a query, a soft label a pair; in parts."""
    rng = np.random.default_rng(0)
    writers: dict[str, pq.ParquetWriter] = {}

    def texts(num_texts: int, num_words: int) -> list[str]:
        return [" ".join(words) for words in WORDS[rng.integers(0, len(WORDS), size=(num_texts, num_words))]]

    for start in range(0, num_pairs, ROWS_AT_ONCE):
        ids = np.arange(start, min(start + ROWS_AT_ONCE, num_pairs))
        product_ids = [f"p{id_}" for id_ in ids]
        query_ids = [f"q{id_ // PRODUCTS_PER_QUERY}" for id_ in ids]
        queries = query_ids[::PRODUCTS_PER_QUERY]
        num_titles = TITLES_PER_QUERY * len(queries)
        keys = {"query_id": query_ids, "product_id": product_ids}
        tables = {
            "catalog": {"product_id": product_ids, "title": texts(len(ids), 8)},
            "queries": {"query_id": queries, "query": texts(len(queries), 3)},
            "judgments": {**keys, "grade": rng.choice(["E", "S", "C", "I"], size=len(ids))},
            "retrieval_table": {
                "query_id": np.repeat(queries, TITLES_PER_QUERY),
                "rank": np.tile(np.arange(1, TITLES_PER_QUERY + 1), len(queries)),
                "product_id": rng.choice(product_ids, num_titles),
                "title": texts(num_titles, 8),
                "similarity": 1.0,
                "source": "lexical",
            },
            "soft_labels": {
                **keys,
                "soft_label": list(rng.dirichlet(np.ones(4), len(ids)).astype(np.float32)),
                "weight": 1.0,
            },
        }
        for name, columns in tables.items():
            table = pa.Table.from_pandas(pd.DataFrame({"market": "kr", **columns}), preserve_index=False)
            if name not in writers:
                writers[name] = pq.ParquetWriter(folder / f"{name}.parquet", table.schema)
            writers[name].write_table(table)
    for writer in writers.values():
        writer.close()


def measure(folder: Path, random_negatives: float, with_soft_labels: bool) -> dict[str, float]:
    """Seconds, and MiB of this process before and above that at most."""
    tokenizer = PromptTokenizer.from_file(TOKENIZER, Budgets())
    soft_labels = folder / "soft_labels.parquet" if with_soft_labels else None
    specs = {
        name: InputSpec(path=str(folder / f"{name}.parquet"), format="parquet")
        for name in ("catalog", "queries", "judgments", "retrieval_table")
    }
    before = memory("VmRSS")
    num_pairs = 0

    def with_targets(batch: pd.DataFrame) -> pd.DataFrame:
        nonlocal num_pairs
        num_pairs += len(batch)
        return batch.assign(target=list(one_hot_targets(batch["grade"], ESCI_LABELS, None)))

    start = time.monotonic()
    with JudgedPairs(JudgedInputs(**specs), {"kr": "ko"}) as pairs:
        pairs.check_apart("train", "dev")
        opened = time.monotonic()
        groups = pairs.groups("train", 8, 0, random_negatives, soft_labels=soft_labels)
        packs = judged_packs(map(with_targets, groups), tokenizer, 512)
        num_packs = write_packs(packs, folder / "packs.arrow")
    seconds = time.monotonic() - start
    return {
        "pairs": num_pairs,
        "packs": num_packs,
        "open_seconds": opened - start,
        "seconds": seconds,
        "before_mib": before,
        "more_mib": memory("VmHWM") - before,
    }


def memory(field: str) -> float:
    """MiB of this process: VmRSS now, VmHWM at most so far.

    From Linux's /proc: ru_maxrss would count what the parent had when it started this process.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--random-negatives", type=float, default=0.0)
    parser.add_argument("--soft-labels", action="store_true")
    args = parser.parse_args()
    for num_pairs in args.pairs:
        spawn = multiprocessing.get_context("spawn")
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as processes,
        ):
            processes.submit(write_tables, Path(folder), num_pairs).result()
            found = processes.submit(measure, Path(folder), args.random_negatives, args.soft_labels).result()
        print(
            f"{num_pairs:,} judged pairs, {found['pairs']:,} pairs in {found['packs']:,} packs: opened in "
            f"{found['open_seconds']:.1f} s, {found['pairs'] / found['seconds']:,.0f} pairs/s, "
            f"{found['more_mib']:,.0f} MiB above {found['before_mib']:,.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
