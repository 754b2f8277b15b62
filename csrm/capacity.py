"""How long a night takes and what it needs, for sizes that nobody has run yet: a formula and measured figures.

    python -m csrm.capacity --queries 1000000 --products-per-query 100 --bundle FOLDER --gpus 8
    ... --tokens-per-second 150000              # of the model on one GPU, or on one core
    ... --tables FOLDER --run-id R              # the figures of a finished run

A night of Q queries with K products each looks at P = Q K pairs and scores a share x of them. Its seconds are the sum
of

    start               fixed
    inputs, plan, audit, publish
                        fixed + P us / cores
    scoring             fixed + x P (us + 10^6 t / rate) / slots

with `us`, microseconds of one core for a pair, and the fixed seconds of each stage in STAGES; slots, what scores one
pack at a time: a GPU, or a core where there are none; rate, tokens a second of the model in one slot; and t, tokens
computed for a pair. With p tokens of a query, s of a product, packs of L tokens, and k products behind one prefix (x K,
for what changed lies among all queries, but at least 1 and at most products_per_chunk),

    t = (p / k + s) / (1 - p i / (L - w)),  i = (k - 1) s / (p + k s),  w = ((p + s)^2 + (k - 1) s^2) / (2 (p + k s))

for where a pack ends between two products of a query, which is the share i of all ends, the prefix is computed again in
the next one; and w tokens of a pack stay empty, half of what did not fit.

Bytes follow the pairs: those of the tables (TABLE_BYTES), what is shuffled (SHUFFLED_KEY_BYTES, and SHUFFLED_TEXT times
a pair's text), and the retrieved titles follow the queries, as csrm.spark.pairs estimates them for their broadcast.

p, s and the length of texts are means over the bundle's golden pairs, which are real ones. The rate is what the
bundle's export measured, --tokens-per-second, or that of a run, which also says how many tokens a pair took, how many
bytes its rows take in the tables, and, if it had 100,000 pairs or more, what Spark costs there.
tests/benchmarks/night_cost.py measures the constants, and compares the formula with nights of other sizes.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from csrm.bundle import Bundle, load_bundle
from csrm.cli import run_job
from csrm.errors import ConfigError, InputError, MissingDependencyError
from csrm.scoring import pair_texts


class StageCost(NamedTuple):
    """What a stage takes beside the model."""

    fixed_s: float
    """Seconds, whatever the night's size."""
    pair_us: float
    """Microseconds of one core for each pair."""


STAGES = {
    "start": StageCost(15.7, 0.0),
    "inputs": StageCost(11.2, 8.1),
    "plan": StageCost(9.4, 10.0),
    "scoring": StageCost(9.2, 124.8),
    "audit": StageCost(3.6, 29.4),
    "publish": StageCost(1.8, 10.4),
}
"""start: of Python and Spark, until the bundle is loaded in a worker. Without the canary, of which a first night has
none."""
TABLE_BYTES = {"scores_staging": 14.7, "run_pairs": 10.1, "relevance_scores": 11.1}
"""Bytes of a pair in each table that grows with the pairs. relevance_scores as one version: rows that a night replaces
stay on storage until jobs/maintain.py, and the change feed of an update holds both."""
SHUFFLED_KEY_BYTES = 80.0
"""Of a candidate pair, in the joins of keys."""
SHUFFLED_TEXT = 0.91
"""Bytes that are shuffled for each byte of a scored pair's text."""

PAIRS_PER_FILE = 4_096
"""Pairs that one task scores: it writes a file of scores_staging for each market among them."""
PRODUCTS_PER_CHUNK = 256
TITLE_BYTES = 64
"""What Spark adds to a title."""
DRIVER_BYTES = 1e9
DRIVER_BYTES_PER_FILE = 3_000.0
"""Of the driver's memory for each staged file, whose entries of Delta's log it collects. Estimated, not measured."""
FEWEST_PAIRS = 100_000
"""Of a run that tells what Spark costs: smaller ones are mostly start."""
NIGHTS = tuple(10**power for power in range(6, 11))
"""Pairs of the nights in the table, beside the one that was asked for."""


@dataclass(frozen=True)
class Figures:
    """What the formula needs to know of a bundle, a device and a Spark; means."""

    prefix_tokens: float
    suffix_tokens: float
    prefix_bytes: float
    """Text of a query with its titles, in UTF-8."""
    suffix_bytes: float
    titles_bytes: float
    """Of a query's retrieved titles in a broadcast."""
    pack_tokens: int
    tokens_per_s: float
    """Of the model in one slot."""
    stages: Mapping[str, StageCost]
    table_bytes: Mapping[str, float]

    def tokens_per_pair(self, products_per_query: float) -> float:
        """Tokens that are computed for a pair, where a query has so many to score; see the formula above."""
        k = min(max(1.0, products_per_query), PRODUCTS_PER_CHUNK)
        p, s = self.prefix_tokens, self.suffix_tokens
        query = p + k * s
        inside = (k - 1) * s / query
        empty = ((p + s) ** 2 + (k - 1) * s**2) / (2 * query)
        return (p / k + s) / (1 - p * inside / (self.pack_tokens - empty))


@dataclass(frozen=True)
class Machines:
    """Where a night runs."""

    slots: int
    """What scores one pack at a time: GPUs, or cores where there are none."""
    cores: int
    """Tasks that run at the same time in all stages but scoring."""


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
    """Of its stages."""
    table_bytes: Mapping[str, float]
    """Bytes of a pair in each of TABLE_BYTES."""


@dataclass(frozen=True)
class Needs:
    """What a night takes."""

    num_queries: float
    num_pairs: float
    num_tokens: float
    seconds: Mapping[str, float]
    """Of each stage."""
    titles_bytes: float
    """What is broadcast, where it is."""
    shuffled_bytes: float
    table_bytes: Mapping[str, float]
    num_files: float
    """Of scores_staging."""

    @property
    def hours(self) -> float:
        return sum(self.seconds.values()) / 3600

    @property
    def stored_bytes(self) -> float:
        return sum(self.table_bytes.values())

    @property
    def driver_bytes(self) -> float:
        return DRIVER_BYTES + DRIVER_BYTES_PER_FILE * self.num_files


@dataclass(frozen=True)
class Plan:
    """Nights of any number of queries, alike but for that."""

    figures: Figures
    machines: Machines
    products_per_query: float
    share_scored: float = 1.0
    num_markets: int = 1

    def needs(self, num_queries: float) -> Needs:
        """What a night of so many queries takes: the formula. Everything in it is linear in their number."""
        figures, num_pairs = self.figures, num_queries * self.products_per_query
        num_scored = self.share_scored * num_pairs
        num_tokens = num_scored * figures.tokens_per_pair(self.share_scored * self.products_per_query)
        seconds = {
            name: stage.fixed_s + num_pairs * stage.pair_us / 1e6 / self._width(name)
            for name, stage in figures.stages.items()
        }
        scoring = figures.stages["scoring"]
        work = num_scored * scoring.pair_us / 1e6 + num_tokens / figures.tokens_per_s
        seconds["scoring"] = scoring.fixed_s + work / self.machines.slots
        text = SHUFFLED_TEXT * (figures.prefix_bytes + figures.suffix_bytes)
        return Needs(
            num_queries=num_queries,
            num_pairs=num_pairs,
            num_tokens=num_tokens,
            seconds=seconds,
            titles_bytes=num_queries * figures.titles_bytes,
            shuffled_bytes=num_pairs * SHUFFLED_KEY_BYTES + num_scored * text,
            table_bytes={
                name: size * (num_scored if name == "scores_staging" else num_pairs)
                for name, size in figures.table_bytes.items()
            },
            num_files=num_scored / PAIRS_PER_FILE * self.num_markets,
        )

    def _width(self, stage: str) -> int:
        """Tasks of a stage at a time."""
        return self.machines.slots if stage == "scoring" else self.machines.cores


class Limit(NamedTuple):
    """Something that a growing night meets."""

    num_queries: float
    """Of the largest night that does not; not above 0 where every night does."""
    what: str
    breaks: bool
    """False where it only makes the night slower."""


def bundle_figures(bundle: Bundle, tokens_per_s: float | None = None) -> Figures:
    """Figures of a bundle, with Spark's as they were measured for the constants above.

    Args:
        tokens_per_s: of the model in one slot; None: what the export measured, with pairs that share no prefix.
    """
    golden, tokenizer = bundle.golden_pairs(), bundle.prompt_tokenizer()
    queries, products = zip(*pair_texts(golden.pairs), strict=True)
    prefix_tokens = _mean(map(len, tokenizer.prefix_ids(queries)))
    suffix_tokens = _mean(map(len, tokenizer.suffix_ids(products)))
    if tokens_per_s is None:
        precision = bundle.settings.precision
        (report,) = (report for report in bundle.settings.precisions if report.precision == precision)
        tokens_per_s = report.pairs_per_s * (prefix_tokens + suffix_tokens)
    return Figures(
        prefix_tokens=prefix_tokens,
        suffix_tokens=suffix_tokens,
        prefix_bytes=_mean(_num_bytes(query.query, *query.retrieved_titles) for query in queries),
        suffix_bytes=_mean(
            _num_bytes(product.title, product.brand, product.category, *_words(product.attributes))
            for product in products
        ),
        titles_bytes=_mean(
            _num_bytes(*query.retrieved_titles) + TITLE_BYTES * len(query.retrieved_titles) for query in queries
        ),
        pack_tokens=bundle.settings.pack_tokens,
        tokens_per_s=tokens_per_s,
        stages=STAGES,
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
    stages = dict(figures.stages)
    if run.num_candidates >= FEWEST_PAIRS:
        for name in ("inputs", "plan", "audit", "publish"):
            marginal = max(0.0, run.seconds[name] - stages[name].fixed_s) * machines.cores / run.num_candidates
            stages[name] = StageCost(stages[name].fixed_s, 1e6 * marginal)
    scoring = stages["scoring"]
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
        stages=stages,
        table_bytes={**figures.table_bytes, **run.table_bytes},
    )


def read_run(tables: str, run_id: str) -> Run:
    """A run from the tables, without Spark.

    Raises:
        InputError: no such tables or run, or it scored nothing.
        MissingDependencyError: deltalake is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.dataset as ds
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise MissingDependencyError("--run-id reads Delta without Spark: pip install 'csrm[eval]'.") from error
    try:
        opened = {name: DeltaTable(f"{tables.rstrip('/')}/{name}") for name in ("scoring_runs", *TABLE_BYTES)}
        runs = opened["scoring_runs"].to_pyarrow_dataset().to_table(filter=ds.field("run_id") == run_id).to_pylist()
    except (DeltaError, OSError) as error:
        raise InputError(f"--tables {tables!r}: cannot be read: {error}") from error
    row = runs[0] if runs else {}
    if not row.get("num_scored") or row.get("finished_at") is None:
        found = "it scored nothing, or has not finished" if runs else "there is none of this name"
        raise InputError(f"--run-id {run_id!r}: expected a finished run that scored pairs in {tables!r}; {found}.")
    planned = opened["run_pairs"].to_pyarrow_dataset()
    scored = planned.scanner(
        columns=["market", "query_id"], filter=(ds.field("run_id") == run_id) & (ds.field("state") == "to_score")
    )
    query_ids: set[tuple[str, str]] = set()
    for batch in scored.to_batches():
        distinct = pa.Table.from_batches([batch]).group_by(["market", "query_id"]).aggregate([])
        query_ids.update(zip(*(column.to_pylist() for column in distinct.columns), strict=True))
    table_bytes = {}
    for name in TABLE_BYTES:
        size, num_rows = _size(opened[name], run_id)
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


def find_limits(
    plan: Plan,
    window_hours: float,
    broadcast_limit_mb: float,
    driver_memory_gb: float,
    storage_gb: float | None = None,
) -> list[Limit]:
    """What a growing night meets, the smallest first.

    Args:
        window_hours: how long it may take.
        broadcast_limit_mb: as in the scoring job's configuration.
        driver_memory_gb: spark.driver.memory.
        storage_gb: that the tables may take; None: any.
    """
    none, one = plan.needs(0), plan.needs(1)

    def largest(limit: float, at_none: float, at_one: float) -> float:
        return (limit - at_none) / (at_one - at_none)

    driver_bytes = driver_memory_gb * 2**30
    limits = [
        Limit(
            largest(window_hours, none.hours, one.hours),
            f"the night is longer than {window_hours:g} hours",
            True,
        ),
        Limit(
            largest(driver_bytes, none.driver_bytes, one.driver_bytes),
            f"the list of staged files fills the driver's {driver_memory_gb:g} GB: raise spark.driver.memory",
            True,
        ),
    ]
    if one.titles_bytes:
        limits.append(
            Limit(
                broadcast_limit_mb * 2**20 / one.titles_bytes,
                f"retrieved titles take more than broadcast_limit_mb = {broadcast_limit_mb:g}: they are joined by a "
                "shuffle, which breaks nothing",
                False,
            )
        )
    if storage_gb is not None:
        limits.append(Limit(storage_gb * 1e9 / one.stored_bytes, f"tables take more than {storage_gb:g} GB", True))
    return sorted(limits)


def capacity_report(plan: Plan, num_queries: float, limits: Sequence[Limit], num_gpus: int | None) -> str:
    """The night that was asked for beside NIGHTS, and what such nights meet; plain text."""
    nights = [plan.needs(num_queries), *(plan.needs(pairs / plan.products_per_query) for pairs in NIGHTS)]
    device, count = ("core", plan.machines.cores) if num_gpus is None else ("GPU", num_gpus)
    rows = [
        ("pairs", [_count(night.num_pairs) for night in nights]),
        ("queries", [_count(night.num_queries) for night in nights]),
        ("tokens", [_count(night.num_tokens) for night in nights]),
        ("hours", [_hours(night.hours) for night in nights]),
        *((f"  {stage}", [_hours(night.seconds[stage] / 3600) for night in nights]) for stage in plan.figures.stages),
        (f"{device}-hours", [_hours(count * night.hours) for night in nights]),
        ("retrieved titles", [_count(night.titles_bytes, "B") for night in nights]),
        ("shuffled", [_count(night.shuffled_bytes, "B") for night in nights]),
        *((name, [_count(night.table_bytes[name], "B") for night in nights]) for name in plan.figures.table_bytes),
        ("staged files", [_count(night.num_files) for night in nights]),
        ("driver memory", [_count(night.driver_bytes, "B") for night in nights]),
    ]
    lines = [f"{'':<18}{'this night':>12}" + f"{'':>12}" * len(NIGHTS)]
    lines += [f"{name:<18}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows]
    lines += ["", "What such nights meet as they grow:"]
    for limit in limits:
        place = f"{_count(limit.num_queries)} queries, {_count(limit.num_queries * plan.products_per_query)} pairs"
        lines.append(f"  above {place}: {limit.what}" if limit.num_queries > 0 else f"  at any size: {limit.what}")
    first = next(limit for limit in limits if limit.breaks)
    verdict = "fits" if num_queries <= first.num_queries else "does not fit"
    lines += ["", f"What breaks first: {first.what}. The night that was asked for {verdict}."]
    return "\n".join(lines)


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


def _count(number: float, unit: str = "") -> str:
    """Three digits, and a factor of thousands before the unit."""
    factors = iter(("", "k", "M", "G", "T", "P"))
    factor = next(factors)
    while number >= 999.5 and (larger := next(factors, None)):
        number, factor = number / 1000, larger
    return f"{number:.3g} {factor}{unit}".rstrip()


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}" if hours >= 0.1 else f"{hours:.3f}"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m csrm.capacity", description="How long a night takes, what it needs, and what breaks first."
    )
    parser.add_argument("--queries", type=int, required=True)
    parser.add_argument("--products-per-query", type=float, required=True)
    parser.add_argument("--bundle", required=True, help="folder of the bundle, or its URI")
    parser.add_argument("--gpus", type=int, help="that score; default: cores do")
    parser.add_argument("--cores", type=int, help="of the executors; default: 8 for each GPU, else this machine's")
    parser.add_argument(
        "--scored", type=float, default=1.0, help="share of the pairs that the night scores; default: 1"
    )
    parser.add_argument("--markets", type=int, default=1, help="default: 1")
    parser.add_argument("--tokens-per-second", type=float, help="of the model on one GPU or core")
    parser.add_argument("--tables", help="with --run-id: folder of the tables that CSRM writes")
    parser.add_argument("--run-id", help="a finished run of this bundle, whose figures are used")
    parser.add_argument("--run-gpus", type=int, help="that the run had; default: those of --gpus")
    parser.add_argument("--run-cores", type=int, help="that the run had; default: those of --cores")
    parser.add_argument("--window-hours", type=float, default=8.0, help="how long a night may take; default: 8")
    parser.add_argument("--broadcast-limit-mb", type=float, default=256.0, help="as configured; default: 256")
    parser.add_argument("--driver-memory-gb", type=float, default=4.0, help="spark.driver.memory; default: 4")
    parser.add_argument("--storage-gb", type=float, help="that the tables may take; default: any")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    _check(args)
    bundle = load_bundle(args.bundle)
    figures = bundle_figures(bundle, args.tokens_per_second)
    source = "the bundle's export, a rough figure" if args.tokens_per_second is None else "--tokens-per-second"
    if args.run_id is not None:
        run = read_run(args.tables, args.run_id)
        if run.bundle_digest != bundle.digest:
            raise ConfigError(
                f"--run-id {args.run_id!r}: scored with bundle {run.bundle_digest[:12]}, expected {bundle.digest[:12]} "
                "of --bundle. Name a run of this bundle."
            )
        figures, source = with_run(figures, run, _machines(args, "run_")), f"run {args.run_id}"
        if args.tokens_per_second is not None:
            figures = replace(figures, tokens_per_s=args.tokens_per_second)
            source = "--tokens-per-second"
    plan = Plan(figures, _machines(args), args.products_per_query, args.scored, args.markets)
    products = max(1.0, args.scored * args.products_per_query)
    cores = f"{plan.machines.cores} cores"
    slots = cores if args.gpus is None else f"{args.gpus} GPUs"
    print(
        f"bundle {bundle.digest[:12]} ({bundle.settings.precision}): {figures.prefix_tokens:.1f} tokens of a query "
        f"with its titles, {figures.suffix_tokens:.1f} of a product, packs of {figures.pack_tokens}\n"
        f"{figures.tokens_per_pair(products):.1f} tokens are computed for a pair, {products:g} pairs of a query\n"
        f"{figures.tokens_per_s:,.0f} tokens/s on each of {slots} (from {source}); {cores} for the rest\n"
    )
    limits = find_limits(plan, args.window_hours, args.broadcast_limit_mb, args.driver_memory_gb, args.storage_gb)
    print(capacity_report(plan, args.queries, limits, args.gpus))
    return 0


def _machines(args: argparse.Namespace, prefix: str = "") -> Machines:
    """Those of the night, or with run_ those of the run, which are the same where nothing else is said."""
    gpus = args.gpus if getattr(args, f"{prefix}gpus") is None else getattr(args, f"{prefix}gpus")
    cores = args.cores if getattr(args, f"{prefix}cores") is None else getattr(args, f"{prefix}cores")
    if cores is None:
        cores = 8 * gpus if gpus is not None else os.cpu_count() or 1
    return Machines(cores if gpus is None else gpus, cores)


def _check(args: argparse.Namespace) -> None:
    """Raises:
    ConfigError: a number that makes no sense, or --tables without --run-id.
    """
    above_0 = [name for name, value in vars(args).items() if isinstance(value, int | float) and value <= 0]
    if above_0 or args.scored > 1 or args.products_per_query < 1:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in above_0)
        raise ConfigError(
            f"expected numbers above 0{f', not so: {names}' if names else ''}; --scored is at most 1, "
            "--products-per-query at least 1."
        )
    if (args.tables is None) != (args.run_id is None):
        raise ConfigError("--tables and --run-id go together: the folder of the tables, and the run in it.")


if __name__ == "__main__":
    sys.exit(run_job(main))
