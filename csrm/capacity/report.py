"""What a planned night needs, in words, and what breaks first."""

from collections.abc import Sequence
from typing import NamedTuple

from csrm.capacity.formula import Plan
from csrm.capacity.search import SearchPlan

NIGHTS = tuple(10**power for power in range(6, 11))
"""Pairs of the nights in the table, beside the one that was asked for."""


class Limit(NamedTuple):
    """Something that a growing night meets."""

    num_queries: float
    """Of the largest night that does not; not above 0 where every night does."""
    what: str
    breaks: bool
    """False where it only makes the night slower."""


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
    fixed, single = plan.needs(0), plan.needs(1)

    def largest(limit: float, at_none: float, at_one: float) -> float:
        return (limit - at_none) / (at_one - at_none)

    driver_bytes = driver_memory_gb * 2**30
    limits = [
        Limit(
            largest(window_hours, fixed.hours, single.hours),
            f"the night is longer than {window_hours:g} hours",
            True,
        ),
        Limit(
            largest(driver_bytes, fixed.driver_bytes, single.driver_bytes),
            f"the list of staged files fills the driver's {driver_memory_gb:g} GB: raise spark.driver.memory",
            True,
        ),
    ]
    if single.titles_bytes:
        limits.append(
            Limit(
                broadcast_limit_mb * 2**20 / single.titles_bytes,
                f"retrieved titles take more than broadcast_limit_mb = {broadcast_limit_mb:g}: they are joined by a "
                "shuffle, which breaks nothing",
                False,
            )
        )
    if storage_gb is not None:
        limits.append(Limit(storage_gb * 1e9 / single.stored_bytes, f"tables take more than {storage_gb:g} GB", True))
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
        *((f"  {phase}", [_hours(night.seconds[phase] / 3600) for night in nights]) for phase in plan.figures.phases),
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


SEARCHES = ((10**6, 10**5), (10**7, 10**6))
"""Products and queries of the searches in the table, beside the one that was asked for."""


def search_report(plan: SearchPlan, num_products: float, num_queries: float, num_gpus: int | None) -> str:
    """The search by meaning that was asked for beside SEARCHES; plain text.

    Args:
        plan: encoder and machines.
        num_products: of all markets.
        num_queries: of all markets.
        num_gpus: GPUs that embed; None: cores do. Cores compare vectors in any case.
    """
    searches = [plan.needs(products, queries) for products, queries in ((num_products, num_queries), *SEARCHES)]
    cores = plan.machines.cores
    device, slots = ("core", cores) if num_gpus is None else ("GPU", num_gpus)
    rows = [
        ("products", [_count(one.num_products) for one in searches]),
        ("queries", [_count(one.num_queries) for one in searches]),
        ("hours, embedding", [_hours(one.embed_s / 3600) for one in searches]),
        ("hours, search", [_hours(one.search_s / 3600) for one in searches]),
        (f"{device}-hours, embedding", [_hours(slots * one.embed_s / 3600) for one in searches]),
        ("core-hours, search", [_hours(cores * one.search_s / 3600) for one in searches]),
        ("broadcast at once", [_count(one.broadcast_bytes, "B") for one in searches]),
        ("broadcasts", [_count(one.num_chunks) for one in searches]),
        ("vectors read", [_count(one.read_bytes, "B") for one in searches]),
        ("shuffled", [_count(one.shuffled_bytes, "B") for one in searches]),
        ("text_vectors", [_count(one.table_bytes, "B") for one in searches]),
    ]
    lines = [f"{'Search by meaning':<24}{'this night':>12}"]
    return "\n".join([*lines, *(f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells) for name, cells in rows)])


def _count(number: float, unit: str = "") -> str:
    """Three digits, and a factor of thousands before the unit."""
    factors = iter(("", "k", "M", "G", "T", "P"))
    factor = next(factors)
    while number >= 999.5 and (larger := next(factors, None)):
        number, factor = number / 1000, larger
    return f"{number:.3g} {factor}{unit}".rstrip()


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}" if hours >= 0.1 else f"{hours:.3f}"
