"""Memory and time of preparing training data: tables of generated pairs to packs on disk.

    python tests/benchmarks/training_memory.py

One process for each size, 100,000 and 1,000,000 judged pairs; prints its peak resident memory and its pairs a second.
Memory should not grow with the pairs.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from csrm.config import InputSpec
from csrm.labels import ESCI_LABELS
from csrm.tokenization import Budgets, PromptTokenizer
from csrm.training.data import JudgedInputs, JudgedPairs
from csrm.training.packs import judged_packs, write_packs
from csrm.training.stage import one_hot_targets

TOKENIZER = Path(__file__).parents[1] / "golden" / "tokenizer.json"
PRODUCTS_PER_QUERY = 20
ROWS_AT_ONCE = 100_000
WORDS = np.array(
    ["wireless", "mouse", "towel", "cotton", "캠핑", "텐트", "무선", "毛巾", "露營", "手機殼", "XL", "240mm"]
)


def write_tables(folder: Path, num_pairs: int) -> JudgedInputs:
    """As many products as pairs, 20 to a query, written in parts."""
    rng = np.random.default_rng(0)
    writers: dict[str, pq.ParquetWriter] = {}
    for start in range(0, num_pairs, ROWS_AT_ONCE):
        ids = np.arange(start, min(start + ROWS_AT_ONCE, num_pairs))
        titles = [" ".join(words) for words in WORDS[rng.integers(0, len(WORDS), size=(len(ids), 8))]]
        queries = np.unique(ids // PRODUCTS_PER_QUERY)
        query_words = WORDS[rng.integers(0, len(WORDS), size=(len(queries), 3))]
        tables = {
            "catalog": {"product_id": [f"p{id_}" for id_ in ids], "title": titles},
            "queries": {
                "query_id": [f"q{id_}" for id_ in queries],
                "query": [" ".join(words) for words in query_words],
            },
            "judgments": {
                "query_id": [f"q{id_ // PRODUCTS_PER_QUERY}" for id_ in ids],
                "product_id": [f"p{id_}" for id_ in ids],
                "grade": rng.choice(["E", "S", "C", "I"], size=len(ids)),
            },
        }
        for name, columns in tables.items():
            table = pa.Table.from_pandas(pd.DataFrame({"market": "kr", **columns}), preserve_index=False)
            if name not in writers:
                writers[name] = pq.ParquetWriter(folder / f"{name}.parquet", table.schema)
            writers[name].write_table(table)
    for writer in writers.values():
        writer.close()
    return JudgedInputs(**{name: InputSpec(path=str(folder / f"{name}.parquet"), format="parquet") for name in writers})


def measure(num_pairs: int) -> dict[str, float]:
    """Peak memory of this process in MiB before and after, and its pairs a second."""
    tokenizer = PromptTokenizer.from_file(TOKENIZER, Budgets())
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_tables(Path(folder), num_pairs)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.monotonic()
        with JudgedPairs(inputs, {"kr": "ko"}) as pairs:
            batches = (
                batch.assign(target=list(one_hot_targets(batch["grade"], ESCI_LABELS, None)))
                for batch in pairs.groups("train", 8, seed=0)
            )
            num_packs = write_packs(judged_packs(batches, tokenizer, 512), Path(folder) / "packs.arrow")
        seconds = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"pairs": num_pairs, "packs": num_packs, "seconds": seconds, "before_mib": before, "peak_mib": after}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--one", action="store_true", help="measure the first size in this process, print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.pairs[0])))
        return
    for num_pairs in args.pairs:
        command = [sys.executable, __file__, "--one", "--pairs", str(num_pairs)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(
            f"{found['pairs']:,} pairs, {found['packs']:,} packs: {found['pairs'] / found['seconds']:,.0f} pairs/s, "
            f"peak {found['peak_mib']:,.0f} MiB ({found['before_mib']:,.0f} MiB before)",
            flush=True,
        )


if __name__ == "__main__":
    main()
