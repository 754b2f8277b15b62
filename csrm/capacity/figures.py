"""The figures that the formula needs: from a bundle, and from a finished run."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from csrm.bundle.loading import Bundle, default_tokens_per_call
from csrm.capacity.formula import PHASES, TABLE_BYTES, Figures, Machines, PhaseCost
from csrm.errors import InputError
from csrm.extras import open_delta
from csrm.night.settings import BYTES_PER_TITLE
from csrm.scoring.scorer import pair_texts

FEWEST_PAIRS = 100_000
"""Of a run that tells what Spark costs: smaller ones are mostly start."""


@dataclass(frozen=True)
class Run:
    """A finished run, as it is in the tables."""

    bundle_digest: str
    num_candidates: int
    num_scored: int
    num_tokens: int
    products_per_query: float
    """Scored pairs of a query that has any."""
    seconds: Mapping[str, float]
    """Of its phases."""
    table_bytes: Mapping[str, float]
    """Bytes of a pair in each of TABLE_BYTES."""


def bundle_figures(bundle: Bundle, tokens_per_s: float | None = None, *, device: str = "cpu") -> Figures:
    """Figures of a bundle, with Spark's as they were measured for the constants above.

    Args:
        tokens_per_s: of the model in one slot; None: what the export measured, with pairs that share no prefix.
        device: cpu or cuda, which scores.
    """
    golden, tokenizer = bundle.golden_pairs(), bundle.prompt_tokenizer()
    queries, products = zip(*pair_texts(golden.pairs), strict=True)
    prefix_tokens = _mean(map(len, tokenizer.prefix_ids(queries)))
    suffix_tokens = _mean(map(len, tokenizer.suffix_ids(products)))
    if tokens_per_s is None:
        tokens_per_s = bundle.settings.report.pairs_per_s * (prefix_tokens + suffix_tokens)
    return Figures(
        prefix_tokens=prefix_tokens,
        suffix_tokens=suffix_tokens,
        prefix_bytes=_mean(_num_bytes(query.query, *query.retrieved_titles) for query in queries),
        suffix_bytes=_mean(
            _num_bytes(product.title, product.brand, product.category, *_words(product.attributes))
            for product in products
        ),
        titles_bytes=_mean(
            _num_bytes(*query.retrieved_titles) + BYTES_PER_TITLE * len(query.retrieved_titles) for query in queries
        ),
        tokens_per_call=max(default_tokens_per_call(device), bundle.settings.budgets.prompt),
        tokens_per_s=tokens_per_s,
        phases=PHASES,
        table_bytes=TABLE_BYTES,
    )


def with_run(figures: Figures, run: Run, machines: Machines) -> Figures:
    """Figures with those of a run in their place.

    Args:
        figures: of the run's bundle.
        run: has scored pairs.
        machines: that the run had.

    Raises:
        InputError: it was faster than the parts of it that are not the model.
    """
    factor = run.num_tokens / run.num_scored / figures.tokens_per_pair(run.products_per_query)
    phases = dict(figures.phases)
    if run.num_candidates >= FEWEST_PAIRS:
        for name in ("inputs", "plan", "audit", "publish"):
            marginal = max(0.0, run.seconds[name] - phases[name].fixed_s) * machines.cores / run.num_candidates
            phases[name] = PhaseCost(phases[name].fixed_s, 1e6 * marginal)
    scoring = phases["scoring"]
    slot_s = (run.seconds["scoring"] - scoring.fixed_s) * machines.slots
    model_s = slot_s - run.num_scored * scoring.pair_us / 1e6
    if model_s <= 0:
        raise InputError(
            f"the run scored {run.num_scored:,} pairs in {run.seconds['scoring']:.1f} s: expected more than the "
            f"{slot_s - model_s:.1f} s of its slots that they take beside the model, and {scoring.fixed_s:.0f} s to "
            "start. Name a larger run, or its --run-gpus or --run-cores."
        )
    return replace(
        figures,
        prefix_tokens=factor * figures.prefix_tokens,
        suffix_tokens=factor * figures.suffix_tokens,
        tokens_per_s=run.num_tokens / model_s,
        phases=phases,
        table_bytes={**figures.table_bytes, **run.table_bytes},
    )


def read_run(tables: str, run_id: str) -> Run:
    """A run from the tables, without Spark.

    Raises:
        InputError: no such tables or run, or it scored nothing.
        MissingDependencyError: deltalake is not installed.
    """
    where = f"--tables {tables!r}"
    try:
        opened = {name: open_delta(f"{tables.rstrip('/')}/{name}", where) for name in ("scoring_runs", *TABLE_BYTES)}
        _, recorded = opened["scoring_runs"]
        runs = recorded.to_table(filter=ds.field("run_id") == run_id).to_pylist()
    except OSError as error:
        raise InputError(f"{where}: cannot be read: {error}") from error
    row = runs[0] if runs else {}
    if not row.get("num_scored") or row.get("finished_at") is None:
        found = "it scored nothing, or has not finished" if runs else "there is none of this name"
        raise InputError(f"--run-id {run_id!r}: expected a finished run that scored pairs in {tables!r}; {found}.")
    _, planned = opened["run_pairs"]
    scored = planned.scanner(
        columns=["market", "query_id"], filter=(ds.field("run_id") == run_id) & (ds.field("state") == "to_score")
    )
    query_ids: set[tuple[str, str]] = set()
    for batch in scored.to_batches():
        distinct = pa.Table.from_batches([batch]).group_by(["market", "query_id"]).aggregate([])
        query_ids.update(zip(*(column.to_pylist() for column in distinct.columns), strict=True))
    table_bytes = {}
    for name in TABLE_BYTES:
        size, num_rows = _size(opened[name][0], run_id)
        if num_rows:
            table_bytes[name] = size / num_rows
    return Run(
        bundle_digest=row["bundle_digest"],
        num_candidates=row["num_candidates"],
        num_scored=row["num_scored"],
        num_tokens=row["num_tokens"],
        products_per_query=row["num_scored"] / max(1, len(query_ids)),
        seconds=dict(row["seconds"]),
        table_bytes=table_bytes,
    )


def _mean(values: Iterator[int]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _num_bytes(*texts: str | None) -> int:
    return sum(len(text.encode()) for text in texts if text is not None)


def _words(attributes: Mapping[str, str | None] | None) -> Iterator[str | None]:
    for name, value in (attributes or {}).items():
        yield name
        yield value


def _size(table: Any, run_id: str) -> tuple[int, int]:
    """Bytes and rows of a table's files: of the run, where it is partitioned by run."""
    actions = table.get_add_actions(flatten=True)
    of_run = actions["partition.run_id"].to_pylist() if "partition.run_id" in actions.column_names else None
    sizes, counts = actions["size_bytes"].to_pylist(), actions["num_records"].to_pylist()
    kept = [place for place in range(len(sizes)) if of_run is None or of_run[place] == run_id]
    return sum(sizes[place] for place in kept), sum(counts[place] or 0 for place in kept)
