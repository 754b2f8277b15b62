"""Score (query, product) pairs in plain Python, with the demo's bundle.

    python docs/examples/score_pairs.py
    python docs/examples/score_pairs.py my_bundle

A pair needs a market, a language, a query and a title. Retrieved titles, brand, category and attributes are optional.
"""

import argparse

import pandas as pd

import csrm

SEARCHES = {
    ("us", "en", "white frying pan"): [
        "Black Nonstick Frying Pan",
        "White Nonstick Skillet, 11-Inch",
        "Wireless Mouse",
    ],
    ("kr", "ko", "프라이팬"): ["무선 마우스", "블랙 후라이팬 28cm", "스테인리스 뒤집개"],
    ("tw", "zh-TW", "平底鍋"): ["無線滑鼠", "不沾煎鍋", "白色不沾平底鍋"],
}
"""Market, language and query, each with the titles of the products that a search has found."""

CLICKED = {
    "white frying pan": ["Cast Iron Frying Pan, 11-Inch", "Black Nonstick Skillet"],
    "프라이팬": ["무쇠 프라이팬 28cm", "블랙 코팅 후라이팬"],
    "平底鍋": ["鑄鐵平底鍋 28cm", "黑色不沾煎鍋"],
}
"""Titles that shoppers clicked after these queries before: they augment the queries."""


def search_results() -> pd.DataFrame:
    """One row per pair: market, language, query, retrieved_titles, title."""
    rows = [(*search, CLICKED[search[-1]], title) for search, titles in SEARCHES.items() for title in titles]
    return pd.DataFrame(rows, columns=["market", "language", "query", "retrieved_titles", "title"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Score (query, product) pairs in plain Python.")
    parser.add_argument("bundle", nargs="?", default="conf/demo_bundle", help="folder of a bundle, or its URI")
    args = parser.parse_args()

    scorer = csrm.load_scorer(args.bundle, device="cpu")  # checks every file, and scores golden pairs
    pairs = search_results()
    scored = pairs.join(scorer.score(pairs))

    for (market, query), products in scored.groupby(["market", "query"], sort=False):
        print(f"{market}: {query}")
        for product in products.sort_values("relevance_score", ascending=False).itertuples():
            print(f"  {product.relevance_score:.3f}  {product.title}")


if __name__ == "__main__":
    main()
