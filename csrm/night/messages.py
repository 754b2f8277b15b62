"""What a run says to the person who started it."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

from csrm.bundle.contents import other_cpu
from csrm.bundle.loading import Bundle
from csrm.cli import Console
from csrm.night.audit import NEVER_ACCEPTED, AuditResult, failures
from csrm.night.context import RunContext
from csrm.night.plan import PlanCounts
from csrm.night.publish import Publication
from csrm.schemas import (
    REJECTED_PAIRS,
    RELEVANCE_SCORES,
    SCORES_STAGING,
)
from csrm.spark.scoring import ScorerInfo
from csrm.spark.tables import table_path
from csrm.text import has_text

MOST_LANGUAGES = 5
"""Named in a warning."""
WAITED_SHARE = 0.2
"""Of the model's time, from which on a run says that it waited for the host."""


def say_publication(console: Console, verdict: str, run_id: str, publication: Publication, tables_dir: str) -> None:
    """The closing lines of a job that published."""
    path, version = table_path(tables_dir, RELEVANCE_SCORES), publication.version
    if publication.num_changes:
        lines = [f"published run {run_id}: relevance_scores version {version}"]
        for market, operations in publication.num_changes.items():
            lines.append(f"  {market}: " + ", ".join(f"{count:,} {name}" for name, count in operations.items()))
    else:
        lines = [f"already published: relevance_scores version {version} has these scores, nothing changed"]
    lines.append(f"table   {path}")
    lines.append(f"read it spark.read.format('delta').option('versionAsOf', {version}).load('{path}')")
    text = "\n".join(lines)
    console.say(verdict, text, run_id=run_id, version=version, changes=publication.num_changes, table=path)


def warn_of_languages(bundle: Bundle, markets: Mapping[str, str], console: Console) -> None:
    """A bundle scores any language; only of those of its golden pairs is it known to have been looked at."""
    known = {language for language in bundle.golden_pairs().pairs["language"] if language}
    names = ", ".join(sorted(known))
    for market, language in markets.items():
        if language not in known:
            text = f"market {market!r} is in {language}; the bundle was proven on pairs in {names} only."
            console.say("warning", f"warning: {text}", market=market, sentence=text)


def warn_of_query_languages(
    bundle: Bundle, num_queries: Mapping[str | None, int], *, markets: Mapping[str, str], console: Console
) -> None:
    """The same of queries that name a language themselves: `ko-KR` makes another prompt than `ko`.

    Args:
        bundle: what scores; where its prompts show no language, nothing is said.
        num_queries: language to its queries; null is the market's, and a blank one was warned of where it was read.
        markets: market to its language; these were looked at before.
        console: says what is unknown.
    """
    if bundle.settings.template.language is None:
        return
    proven = {language for language in bundle.golden_pairs().pairs["language"] if language}
    known = proven | set(markets.values())
    unknown = {name: number for name, number in num_queries.items() if has_text(name) and name not in known}
    if unknown:
        most = sorted(unknown, key=lambda name: (-unknown[name], name))[:MOST_LANGUAGES]
        text = (
            f"{sum(unknown.values()):,} queries name languages that the bundle was not proven on, such as "
            f"{', '.join(f'{name!r} ({unknown[name]:,})' for name in most)}; it was on pairs in "
            f"{', '.join(sorted(proven))}. Where it is another name of one of these, write that one in column "
            "language, or null for the market's: another name makes another prompt."
        )
        console.say("warning", f"warning: {text}", sentence=text)


def warn_of_other_cpu(bundle: Bundle, scorer: ScorerInfo, console: Console) -> None:
    """The speed by which a bundle's precision was chosen is that of the CPU of its export."""
    if text := other_cpu(bundle.settings, scorer.cpu_features):
        console.say("warning", f"warning: bundle: {text}.", sentence=text)


def warn_of_left_markets(published: Iterable[str], markets: Collection[str], console: Console) -> None:
    """Name the published markets that the configuration lacks: no run of it updates or deletes their rows."""
    if left := sorted(set(published) - set(markets)):
        text = (
            f"relevance_scores has the markets {left}, which are not among 'markets': this run leaves them alone. "
            "Where no other configuration scores them: jobs/retire.py."
        )
        console.say("warning", f"warning: {text}", markets=left, sentence=text)


def warn_of_missing_titles(found: Iterable[str], markets: Collection[str], console: Console) -> None:
    """Name the markets without any retrieved title, whose prompts lack what the model was trained with."""
    if missing := sorted(set(markets) - set(found)):
        text = (
            f"retrieval_table has no titles for the markets {missing}: their queries are scored without. Build them: "
            "jobs/build_retrieval_table.py; or set use_retrieved_titles: false."
        )
        console.say("warning", f"warning: {text}", markets=missing, sentence=text)


def say_plan(context: RunContext, counts: PlanCounts, pairs_per_s: float, *, is_of_export: bool) -> None:
    """What is to be done, and about how long that takes.

    Args:
        context: the run.
        counts: of its plan.
        pairs_per_s: by which the time is told.
        is_of_export: whether that is the rate of the bundle's export, since no run scored with it on this device.
    """
    markets, digest = sorted(context.config.markets), context.scorer.digest
    seconds = counts.num_to_score / pairs_per_s
    reused = f"{counts.num_reused:,} scored by a run that was not published, " if counts.num_reused else ""
    by_export = " after the start, if as fast as at the export" if is_of_export else ""
    estimate = f" in about {_duration(seconds)}{by_export}" if counts.num_to_score else ""
    context.console.say(
        "plan",
        f"run {context.run_id}: {counts.num_candidates:,} candidate pairs of {', '.join(markets)}: "
        f"{counts.num_unchanged:,} unchanged, {reused}{counts.num_to_score:,} to score{estimate}; "
        f"bundle {digest[:12]} ({context.bundle.settings.precision}) on {context.device_text}",
        run_id=context.run_id,
        markets=markets,
        bundle_digest=digest,
        device=context.device_text,
        rejected=counts.rejected,
        num_candidates=counts.num_candidates,
        num_unchanged=counts.num_unchanged,
        num_reused=counts.num_reused,
        num_to_score=counts.num_to_score,
        estimated_seconds=round(seconds, 1),
    )
    say_rejected_pairs(context.console, counts.rejected)


def say_rejected_pairs(console: Console, rejected: Mapping[str, int]) -> None:
    if rejected:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(rejected.items()))
        console.say("rejected_pairs", f"rejected {sum(rejected.values()):,} pairs: {listed}", **rejected)


def say_halved_packs(console: Console, num_packs: int) -> None:
    if num_packs:
        text = (
            f"halved {num_packs:,} packs or calls, for which the device's memory did not suffice; later ones were made "
            "smaller. Smaller ones take longer: give a task more memory, or lower tokens_per_call."
        )
        console.say("packs_halved", text, num_packs=num_packs)


def say_host_limit(console: Console, share_waited: float) -> None:
    """Where the model waited for its pairs, a faster device would not shorten the night."""
    if share_waited >= WAITED_SHARE:
        text = (
            f"the host is the limit: the model waited {share_waited:.0%} of its time for pairs to be prepared. Give a "
            "task that scores more cores."
        )
        console.say("host_limit", text, share_waited=share_waited)


def say_scored(console: Console, num_pairs: int, seconds: float, share_saved: float) -> None:
    if num_pairs:
        text = (
            f"scored {num_pairs:,} pairs in {seconds:.1f} s, {num_pairs / seconds:,.0f} pairs/s with start and write; "
            f"shared prefixes saved {share_saved:.0%} of the tokens"
        )
        console.say("scored", text, num_pairs=num_pairs, seconds=seconds, share_saved=share_saved)


def say_warnings(console: Console, results: Sequence[AuditResult]) -> None:
    for result in results:
        if not result["passed"] and result["severity"] == "warning":
            console.say("warning", f"warning: {_described(result)}", **result)


def say_rejected(context: RunContext, results: Sequence[AuditResult]) -> str:
    """The message of the error that ends a rejected run."""
    failed, tables, run_id = failures(results), context.config.tables, context.run_id
    context.console.say("rejected", "", run_id=run_id, failed=failed)
    names = sorted({result["name"] for result in failed})
    again = f"csrm publish --config FOLDER/publish.yaml --run-id {run_id}"
    return (
        f"run {run_id}: the audit rejected it, nothing was published:\n"
        + "\n".join(f"  - {_described(result)}" for result in failed)
        + f"\nIts scores are kept in {table_path(tables, SCORES_STAGING)}, the pairs without a score in "
        f"{table_path(tables, REJECTED_PAIRS)}.\n"
        f"Where the state is right all the same: {again} "
        + " ".join(f"--accept {name}" for name in names if name not in NEVER_ACCEPTED)
        + f' --reason "..."\nWhere its scores are wrong: {again} --discard\n'
        "FOLDER has this night's configuration; docs/runbook.md explains each check."
    )


def _described(result: AuditResult) -> str:
    value = _number(result["value"])
    return f"{result['market']}: {result['name']}: {value}, expected {result['bound']}. {result['sentence']}"


def _number(value: float | None) -> str:
    return "no number" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
