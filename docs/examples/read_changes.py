"""Follow the change feed of relevance_scores, without Spark or Java: print what changed since the last call.

    python docs/examples/read_changes.py build/demo/tables/relevance_scores last_version.txt

The first call reads the whole table. Each later call reads the changes since the version in the file. The file is
written last, so the next call repeats an interrupted one: make what you do with a change safe to repeat. Where the feed
does not reach back far enough any more (change_feed_days of conf/maintain.yaml), delete the file and start again.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

Change = dict[str, Any]
"""The columns of relevance_scores, and _change_type: insert, update_postimage or delete."""


def changes_since(table: DeltaTable, version: int | None) -> Iterator[Change]:
    """What has to be done to be where the table is.

    Args:
        table: relevance_scores.
        version: version that was read last; None: nothing was.
    """
    if version is None:
        yield from ({**row, "_change_type": "insert"} for row in table.to_pyarrow_table().to_pylist())
    elif version < table.version():
        feed = pa.table(table.load_cdf(starting_version=version + 1, ending_version=table.version()).read_all())
        rows = sorted(feed.to_pylist(), key=lambda row: int(row["_commit_version"]))
        yield from (row for row in rows if row["_change_type"] != "update_preimage")


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what changed in relevance_scores since the last call.")
    parser.add_argument("table", help="folder of relevance_scores, or its URI")
    parser.add_argument("state", type=Path, help="file that remembers the last version")
    args = parser.parse_args()

    last = int(args.state.read_text(encoding="utf-8")) if args.state.exists() else None
    table = DeltaTable(args.table)
    num_changes = 0
    for change in changes_since(table, last):
        pair = f"{change['market']} {change['query_id']} {change['product_id']}"
        print(f"{change['_change_type']:<16}  {pair:<28}  {change['relevance_score']:.3f}")
        num_changes += 1
    print(f"{num_changes:,} changes up to version {table.version()}")
    args.state.write_text(f"{table.version()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
