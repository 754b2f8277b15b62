"""A proposal for people: what was found, which recipe fits, and the commands that come next."""

from collections.abc import Mapping
from pathlib import Path

from csrm.config import InputSpec
from csrm.start.files import SHARED
from csrm.start.proposal import Proposal


def format_proposal(proposal: Proposal, folder: Path, *, has_bundle: bool) -> str:
    """Plain text.

    Args:
        proposal: what the tables are taken for.
        folder: where its files were written.
        has_bundle: whether there is a bundle to score with, so that nothing need be trained.
    """
    lines = [f"{name}: {spec.path} ({spec.format}){_columns(spec)}" for name, spec in proposal.inputs.items()]
    lines += [f"market {market}: {language}, {why}" for market, (language, why) in proposal.languages.items()]
    if proposal.grades is not None:
        gains = ", ".join(f"{grade} {gain:g}" for grade, gain in reversed(list(proposal.grades.gains.items())))
        splits = ", ".join(f"{count:,} {split}" for split, count in proposal.splits.items())
        lines += [f"grades: {gains} ({proposal.grades.why}); judgments: {splits}"]
    lines += [f"recipe {proposal.recipe.name}: {proposal.recipe.why}"]
    lines += [f"note: {note}" for note in proposal.notes]
    lines += [
        "",
        f"wrote {folder}: {SHARED}, which all jobs share, and a file for each job. Look at {folder / SHARED}.",
        "",
    ]
    return "\n".join(lines + _next(proposal, folder, has_bundle))


def _columns(spec: InputSpec) -> str:
    columns: Mapping[str, str | None] = spec.columns
    named = [f"{name} is {there}" for name, there in columns.items() if there is not None]
    left_out = [name for name, there in columns.items() if there is None]
    named += [f"market is {spec.market!r} in each row"] if spec.market is not None else []
    text = f": {', '.join(named)}" if named else ""
    return text + (f"; left out, as you said or since of another type: {', '.join(left_out)}" if left_out else "")


def _next(proposal: Proposal, folder: Path, has_bundle: bool) -> list[str]:
    commands, head = ["build-retrieval-table", "train", "export-bundle"], "next:"
    if has_bundle:
        commands = []
    elif not proposal.recipe.judged:
        commands = ["build-candidates", "export-bundle"]
        head = "next: bring Qwen3-Reranker, or another reranker with its template in export_bundle.yaml. Then"
    made = [f"  csrm {name} --config {folder / name.replace('-', '_')}.yaml" for name in commands]
    return [head, *made, f"  csrm run night --config {folder}"]
