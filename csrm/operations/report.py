"""The page about one scoring run: its verdict first, then why, and what became of the published scores."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from csrm.night.audit import NEVER_ACCEPTED
from csrm.pages.page import is_known, render, rows
from csrm.pages.plots import COLOURS, INK, QUIET, new_figure, svg

if TYPE_CHECKING:
    from markupsafe import Markup
from csrm.operations.findings import NUM_PLOT_BINS, Comparison, RunFindings, shortened

_PLOT_WIDTH = 3.4  # inches, as wide as a phone: letters keep their size there
_PHASES = {
    "inputs": QUIET,
    "plan": COLOURS[2],
    "scoring": COLOURS[0],
    "canary": COLOURS[3],
    "audit": COLOURS[1],
    "publish": "#c2a83e",
}
"""In their order, with their colours."""
FEWEST_SHARE = 0.1
"""Of the pairs of the largest run, from which on a run's rate is shown."""


@dataclass(frozen=True)
class Verdict:
    """What a run came to, in words."""

    tone: str
    """good, warn or bad."""
    word: str
    sentences: Sequence[str]
    commands: Sequence[str] = ()
    """What can be done, as command lines."""


def night_report_html(findings: RunFindings, made_at: datetime) -> str:
    """The page.

    Args:
        findings: what is known of the run.
        made_at: when the page was made, UTC.

    Returns:
        HTML that can be written as UTF-8.
    """
    run = findings.runs[0]
    audit = audit_results(run)
    rejected = findings.rejected
    if rejected is None:
        counts = (run["rejected"] or {}).items()
        rejected = pd.DataFrame([(None, *row) for row in counts], columns=["market", "reason", "num_pairs"])
    comparison = findings.comparison
    return render(
        "operations/report.html",
        run=run,
        made_at=made_at,
        num_newer=findings.num_newer,
        verdict=verdict(run, findings.taken_back.get(run["run_id"], ())),
        notes=findings.notes,
        pairs=pair_counts(run, comparison),
        seconds=_by_phase(run["seconds"]),
        pairs_per_second=pairs_per_second(run, findings.runs),
        tokens_per_second=_per_second(run["num_tokens"], run, findings.runs),
        failed=[result for result in audit if not result["passed"]],
        passed=[result for result in audit if result["passed"]],
        distributions=_distributions(comparison, run["markets"]) if comparison is not None else [],
        comparison=comparison,
        grades=_grades(comparison.bins) if comparison is not None else [],
        changes=_changes_by_market(comparison.changes) if comparison is not None else {},
        moved=_moved(findings) if comparison is not None else [],
        lost=_lost(comparison) if comparison is not None else [],
        rejected=rows(rejected.sort_values(["num_pairs", "reason"], ascending=[False, True])),
        samples=rows(findings.samples) if findings.samples is not None else [],
        history=_history(findings),
        num_runs=len(findings.runs),
        throughput_plot=_throughput_plot(findings.runs),
        seconds_plot=_seconds_plot(findings.runs),
        queries=findings.queries,
        products=findings.products,
        languages=findings.languages,
        shortened=shortened,
        reasons=_REASONS,
    )


_REASONS = {
    "no_query": "the queries table does not have the query",
    "no_product": "the catalog does not have the product",
    "empty_query": "the query has no text",
    "empty_title": "the product has no title",
    "tokenizer_error": "the tokenizer fails on the text",
    "model_error": "the model fails on the pair",
    "not_finite": "the model's answer is no number",
    "process_died": "the process died at the pair, or was silent for too long, again and again",
}


def verdict(run: Mapping[str, Any], taken_back: Sequence[str] = ()) -> Verdict:
    """What a run came to.

    Args:
        run: its row of scoring_runs.
        taken_back: what was done since to what it had published, see RunFindings.
    """
    came_to = _verdict_of_run(run)
    if not taken_back:
        return came_to
    return Verdict("warn", f"{came_to.word}, then changed", [*taken_back, *came_to.sentences], came_to.commands)


def _verdict_of_run(run: Mapping[str, Any]) -> Verdict:
    word, changes = run["verdict"], run["changes"] or {}
    again = f"csrm publish --config FOLDER/publish.yaml --run-id {shlex.quote(run['run_id'])}"
    results = [result["result"] for result in audit_results(run)]
    is_clean = results.count("passed") == len(results)
    remarks = _remarks(results)
    match word:
        case "published":
            before = "" if run["base_version"] is None else f"from version {run['base_version']} "
            counts = [(changes.get(name, 0), text) for name, text in _CHANGES.items()]
            what = ", ".join(f"{count:,} {text}" for count, text in counts if count) or "no row changed"
            sentence = f"relevance_scores went {before}to version {run['published_version']}: {what}."
            return Verdict("good" if is_clean else "warn", "Published", [sentence, *remarks])
        case "already_published":
            sentence = f"Nothing changed: relevance_scores version {run['published_version']} has these scores already."
            return Verdict("good" if is_clean else "warn", "Already published", [sentence, *remarks])
        case "rejected":
            names = sorted({result["name"] for result in audit_results(run) if result["result"] == "error"})
            is_acceptable = not set(names) & set(NEVER_ACCEPTED)
            way_out = "published without scoring again, or thrown away" if is_acceptable else "thrown away"
            num_errors = _counted(results.count("error"), "check")
            sentence = (
                f"Nothing was published: the audit failed in {num_errors}. The scores are kept; after a review they "
                f"can be {way_out}."
            )
            accept = " ".join(f"--accept {shlex.quote(name)}" for name in names)
            commands = [f'{again} {accept} --reason "..."'] * is_acceptable + [f"{again} --discard"]
            return Verdict("bad", "Rejected", [sentence, *remarks], commands)
        case "superseded":
            done = "Only a part of its markets was published" if run["changes"] else "Nothing was published"
            sentence = (
                f"{done}: another run had published after this one compared. "
                "The scores are kept, and the next run uses those that are still right."
            )
            return Verdict("warn", "Superseded", [sentence, *remarks])
        case "discarded":
            return Verdict("warn", "Discarded", ["Nothing was published, and the scores were thrown away.", *remarks])
        case "running":
            sentence = (
                "The run has no end: it still runs, or it died. Started again, with this or another run id, the job "
                "goes on from the scores that are kept."
            )
            return Verdict("warn", "Running, or died", [sentence, *remarks])
        case _:
            return Verdict("warn", str(word), remarks)


_CHANGES = {"insert": "inserted", "update": "updated", "delete": "deleted"}


def _remarks(results: Sequence[str]) -> list[str]:
    accepted, warnings = results.count("accepted"), results.count("warning")
    remarks = []
    if accepted:
        remarks.append(f"A person accepted {_counted(accepted, 'failed check')}; the reasons are below.")
    if warnings:
        remarks.append(f"The audit warns of {_counted(warnings, 'check')}.")
    return remarks


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def audit_results(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A run's audit with `result` (error, warning, accepted or passed) and `shown` (the value); errors first."""
    results = [
        {**result, "result": _result(result), "shown": _shown_value(result["value"])}
        for result in json.loads(run["audit"] or "[]")
    ]
    order = ("error", "warning", "accepted", "passed")
    return sorted(results, key=lambda result: (order.index(result["result"]), result["market"]))


def _result(result: Mapping[str, Any]) -> str:
    if result["passed"]:
        return "passed"
    return "accepted" if result["accepted"] is not None else str(result["severity"])


def _shown_value(value: float | str | None) -> str:
    if value is None:
        return "no number"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"


def pair_counts(run: Mapping[str, Any], comparison: Comparison | None = None) -> list[tuple[str, str, int | None]]:
    """What became of the candidate pairs: a name, what it means, pairs; in all, those of a run that came to its end."""
    rejected = run["rejected"]
    counts: list[tuple[str, str, int | None]] = [
        ("unchanged", "published score still right", run["num_unchanged"]),
        ("reused", "scored by an earlier attempt", run["num_reused"]),
        ("scored", "scored by this run", run["num_scored"]),
        ("rejected", "could not be scored", None if rejected is None else sum(rejected.values())),
    ]
    if comparison is not None:
        pending = comparison.changes.loc[comparison.changes["operation"] == "pending", "num_pairs"].sum()
        if pending:
            counts.append(("missing", "not scored yet", int(pending)))
    return counts


def pairs_per_second(run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Pairs that a run scored by the second of its scoring phase, which begins with the start of the workers.

    Args:
        run: one of the runs.
        runs: those of the page.

    Returns:
        None where the run scored nothing, or less than FEWEST_SHARE of what the largest of the runs did: its start
        would hide the rate.
    """
    return _per_second(run["num_scored"], run, runs)


def _per_second(count: int | None, run: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> float | None:
    seconds, most = run["seconds"].get("scoring"), max((other["num_scored"] or 0) for other in runs)
    is_large = (run["num_scored"] or 0) >= FEWEST_SHARE * most
    return count / seconds if count and seconds and is_large else None


def _by_phase(seconds: Mapping[str, float]) -> dict[str, float]:
    """The phases in the order in which a run takes them; those that are not known come last."""
    return {phase: seconds[phase] for phase in [*_PHASES, *seconds] if phase in seconds}


def _history(findings: RunFindings) -> list[dict[str, Any]]:
    """The runs and, between them, what changed the scores without a run; newest first."""
    events = [{"at": at, "event": sentence} for at, sentence in findings.interventions]
    runs = [
        {
            **run,
            "at": run["started_at"],
            "event": None,
            "pairs_per_second": pairs_per_second(run, findings.runs),
            "taken_back": " ".join(findings.taken_back.get(run["run_id"], ())),
            **_num_failed(run),
        }
        for run in findings.runs
    ]
    return sorted([*events, *runs], key=lambda row: row["at"], reverse=True)


def _num_failed(run: Mapping[str, Any]) -> dict[str, int]:
    results = [result["result"] for result in audit_results(run)]
    return {"num_errors": results.count("error") + results.count("accepted"), "num_warnings": results.count("warning")}


def _distributions(comparison: Comparison, markets: Sequence[str]) -> list[dict[str, Any]]:
    """Of each market that has scores: a plot, and what its two states are."""
    found = []
    for index, market in enumerate(markets):
        bins = comparison.bins[comparison.bins["market"] == market]
        if bins["num_pairs"].sum() == 0:
            continue
        summary = comparison.summary[comparison.summary["market"] == market].set_index("state")
        states = []
        for state in ("before", "after"):
            own = bins[bins["state"] == state]
            num_pairs = int(own["num_pairs"].sum())
            grades = own.groupby("grade")["num_pairs"].sum() / max(num_pairs, 1)
            states.append(
                {
                    "state": state,
                    "num_pairs": num_pairs,
                    "num_unusable": int(own.loc[own["bin"] < 0, "num_pairs"].sum()),
                    "grades": grades.to_dict(),
                    **{name: summary.loc[state, name] if state in summary.index else None for name in _SUMMARY},
                }
            )
        plot = _score_plot(bins, f"Market {index + 1} of {len(markets)}: {_in_words(states)}")
        found.append({"market": market, "states": states, "plot": plot})
    return found


def _grades(bins: pd.DataFrame) -> list[str]:
    """The grades, that of the highest scores first."""
    weighted = bins.assign(total=bins["bin"] * bins["num_pairs"]).groupby("grade")[["total", "num_pairs"]].sum()
    return list((weighted["total"] / weighted["num_pairs"]).sort_values(ascending=False, kind="stable").index)


def _changes_by_market(changes: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Market to operation to its figures; pairs that are not scored yet are no change."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows(changes[changes["operation"] != "pending"]):
        found.setdefault(str(row["market"]), {})[str(row["operation"])] = row
    return found


_SUMMARY = ("mean", "p10", "p50", "p90")


def _in_words(states: Sequence[Mapping[str, Any]]) -> str:
    parts = [
        f"{state['state']} the run {state['num_pairs']:,} pairs of median score {state['p50']:.3f}"
        for state in states
        if is_known(state["p50"])
    ]
    return "share of pairs by relevance score; " + "; ".join(parts)


def _score_plot(bins: pd.DataFrame, description: str) -> "Markup":
    figure, axes = new_figure("relevance score", "share of pairs", _PLOT_WIDTH, 2.1)
    edges = np.linspace(0, 1, NUM_PLOT_BINS + 1)
    lowest = 0.1
    for state, colour, width in (("before", QUIET, 2.5), ("after", COLOURS[0], 1.4)):
        own = bins[(bins["state"] == state) & (bins["bin"] >= 0)]
        counts = np.bincount(own["bin"], weights=own["num_pairs"], minlength=NUM_PLOT_BINS)
        if counts.sum():
            shares = counts / counts.sum()
            lowest = min(lowest, shares[shares > 0].min())
            axes.stairs(np.where(shares > 0, shares, np.nan), edges, baseline=None, color=colour, linewidth=width)
    axes.set_yscale("log")
    axes.set_ylim(10 ** np.floor(np.log10(lowest)), 1)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.6%}".rstrip("%").rstrip("0").rstrip(".") + " %")
    axes.set_xlim(0, 1)
    axes.tick_params(labelsize=8)
    axes.minorticks_off()
    return svg(figure, description)


def _moved(findings: RunFindings) -> list[tuple[str, str, str, list[dict[Any, Any]]]]:
    assert findings.comparison is not None
    return [
        ("Queries", "query", "product", rows(findings.comparison.queries)),
        ("Products", "product", "query", rows(findings.comparison.products)),
    ]


def _lost(comparison: Comparison) -> list[tuple[str, str, list[dict[Any, Any]]]]:
    return [
        ("Queries", "query", rows(comparison.lost_queries)),
        ("Products", "product", rows(comparison.lost_products)),
    ]


def _throughput_plot(runs: Sequence[Mapping[str, Any]]) -> "Markup | None":
    speeds_of = [(index, pairs_per_second(run, runs)) for index, run in enumerate(reversed(runs))]
    points = [(index, speed) for index, speed in speeds_of if speed]
    if len(points) < 2:
        return None
    figure, axes = new_figure("", "pairs scored / s", _PLOT_WIDTH, 2.1)
    places, speeds = zip(*points, strict=True)
    axes.plot(places, speeds, color=COLOURS[0], linewidth=1.2, marker="o", markersize=3)
    if places[-1] == len(runs) - 1:
        axes.plot(places[-1:], speeds[-1:], color=COLOURS[0], marker="o", markersize=7)
    axes.set_ylim(0, max(speeds) * 1.1)
    _label_runs(axes, runs)
    return svg(figure, f"Pairs scored by the second, of the last {len(runs)} runs; the last is {speeds[-1]:,.0f}")


def _seconds_plot(runs: Sequence[Mapping[str, Any]]) -> "Markup | None":
    if len(runs) < 2:
        return None
    figure, axes = new_figure("", "minutes", _PLOT_WIDTH, 2.1)
    bottom = np.zeros(len(runs))
    for phase, colour in _PHASES.items():
        minutes = np.array([run["seconds"].get(phase, 0.0) / 60 for run in reversed(runs)])
        if minutes.any():
            axes.bar(range(len(runs)), minutes, bottom=bottom, width=0.8, color=colour, label=phase)
            bottom += minutes
    if not bottom.any():
        return None
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    _label_runs(axes, runs)
    return svg(figure, f"Minutes by phase, of the last {len(runs)} runs; the last took {bottom[-1]:,.1f}")


def _label_runs(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Data dates below some of the places, oldest run first, and the last; with times where dates repeat."""
    step = -(-len(runs) // 5)
    places = list(range(len(runs) - 1, -1, -step))[::-1]
    dates = [run["data_date"] for run in reversed(runs)]
    times = [f" {run['started_at']:%H:%M}" for run in reversed(runs)]
    repeats = len({dates[place] for place in places}) < len(places)
    axes.set_xlim(-0.6, len(runs) - 0.4)
    axes.set_xticks(places, [f"{dates[place]:%d %b}{times[place] * repeats}" for place in places])
    axes.tick_params(labelsize=8)
    axes.spines["bottom"].set_color(INK)
