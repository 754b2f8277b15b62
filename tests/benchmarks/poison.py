"""What pairs cost that cannot be scored: the same pairs through one bundle, without and with a poisoned thousandth.

    python tests/benchmarks/poison.py                        # the demo's bundle, 20,000 pairs
    python tests/benchmarks/poison.py --bundle FOLDER --pairs 2000

The bundle's graph gets nodes that raise, or give NaN, where a letter is in the text (tests/faults/bundles.py). Both
nights are scored in turns, in one process, by one thread.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from csrm.bundle.loading import load_scorer
from csrm.market import builtin_lexicon, generate_market
from tests.faults.bundles import ERROR_MARK, NAN_MARK, faulty_bundle

REPOSITORY = Path(__file__).parents[2]
PRODUCTS_PER_QUERY = 100
STEP = 1_024
"""Pairs that a worker scores at once; see csrm.spark.scoring."""


def make_pairs(num_pairs: int) -> pd.DataFrame:
    """Pairs of queries with a hundred random products each."""
    num_queries = max(1, num_pairs // PRODUCTS_PER_QUERY)
    market = generate_market(
        7,
        {"us": "en"},
        num_products=5_000,
        num_queries=num_queries,
        label_noise=0.0,
        lexicons={"en": builtin_lexicon("en")},
    )
    catalog = market.catalog.dropna(subset="title")
    rng = np.random.default_rng(0)
    products = catalog.iloc[rng.choice(len(catalog), num_queries * PRODUCTS_PER_QUERY)]
    queries = market.queries["query"].head(num_queries).repeat(PRODUCTS_PER_QUERY)
    pairs = products[["title", "brand", "category", "attributes"]].assign(query=queries.to_numpy())
    return pairs.assign(market="us", language="en", retrieved_titles=None).reset_index(drop=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=REPOSITORY / "conf" / "demo_bundle")
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    clean = make_pairs(args.pairs)
    poisoned = clean.copy()
    rows = np.random.default_rng(1).choice(len(clean), max(2, len(clean) // 1_000), replace=False)
    poisoned.loc[rows, "title"] += np.where(np.arange(len(rows)) % 2, ERROR_MARK, NAN_MARK)
    seconds: dict[str, list[float]] = {"clean": [], "poisoned": []}
    with tempfile.TemporaryDirectory() as folder:
        scorer = load_scorer(faulty_bundle(args.bundle, Path(folder) / "bundle"), "cpu", threads=1)
        for _ in range(args.repeats):
            for name, pairs in (("clean", clean), ("poisoned", poisoned)):
                start = time.perf_counter()
                scored = [scorer.score_or_reject(pairs.iloc[at : at + STEP]) for at in range(0, len(pairs), STEP)]
                seconds[name].append(time.perf_counter() - start)
                num_rejected = int(pd.concat(scored)["reason"].notna().sum())
                expected = len(rows) if name == "poisoned" else 0
                if num_rejected != expected:
                    raise SystemExit(f"{name}: expected {expected} pairs without a score, got {num_rejected}.")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{len(clean):,} pairs, {len(rows)} poisoned: {medians['clean']:.2f} s without them, ", end="")
    print(f"{medians['poisoned']:.2f} s with them: {medians['poisoned'] / medians['clean']:.3f} times as long")


if __name__ == "__main__":
    main()
