"""The result of a training for people: a page, and what is printed."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from csrm.evaluation.metrics import PAIR_METRICS, QUERY_METRICS
from csrm.evaluation.report import format_evaluation
from csrm.training.best_step import METRICS, SCORE, kept_step
from csrm.training.data.judges import Agreement
from csrm.training.distillation.label_quality import Calibration
from csrm.training.distillation.rounds import Round
from csrm.training.distillation.teacher import TaughtPairs
from csrm.training.model.relevance import TASKS
from csrm.training.report import RoundRecord, StageRecord, largest_moves, reliability, report_html
from csrm.training.results import DistillationResult, TrainingResult, TranslationResult
from csrm.training.settings import TrainConfig, grade_gains
from csrm.training.trained import read_history, trained_scorer

NUM_SHOWN_ISSUES = 3
"""Label issues that are printed; the rest is in their own file."""


def write_report(
    config: TrainConfig,
    scored: pd.DataFrame | None,
    translation: TranslationResult | None,
    distillation: DistillationResult | None,
    agreement: Agreement | None = None,
) -> Path:
    """Write the one-page report of a training; returns where it is.

    Args:
        scored: pairs of the dev split with their scores; None where it has none.
        translation: what the translation step gave; None where it was left out.
        distillation: what the rounds gave; None where they were left out.
        agreement: how far judges agree; None where the judgments name none.
    """
    model_dir = Path(config.model_dir)
    rounds = distillation.rounds if distillation is not None else []
    best = distillation.best if distillation is not None else None
    trained = _trained_rounds(distillation)
    folders = [translation.model_dir] if translation is not None else []
    folders += [round_.model_dir for round_ in trained] or [model_dir]
    calibration = moves = None
    if scored is not None:
        _, relevant, _ = grade_gains(config)
        calibration = reliability(scored[SCORE].to_numpy(), scored["grade"].isin(relevant).to_numpy())
        if best is not None and best.round_index and rounds[0] in trained:
            moves = _moves_since(rounds[0], scored, config)
    page = report_html(
        f"Training of {model_dir.name}",
        stages=[_stage_record(folder) for folder in folders],
        rounds=[_round_record(round_, is_kept=round_ is best) for round_ in rounds],
        reliability=calibration,
        label_issues=distillation.label_issues if distillation is not None else None,
        moves=moves,
        agreement=agreement,
    )
    config.stages_dir.mkdir(parents=True, exist_ok=True)
    path = config.stages_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _trained_rounds(distillation: DistillationResult | None) -> list[Round]:
    """The rounds that have a model; others have teachers alone."""
    if distillation is None:
        return []
    return [round_ for round_ in distillation.rounds if round_ is distillation.best or round_.dev_auc is not None]


def _moves_since(first: Round, scored: pd.DataFrame, config: TrainConfig) -> pd.DataFrame:
    """Pairs whose score moved most since the first round."""
    scorer = trained_scorer(first.model_dir, config.tuning.known_precision)
    return largest_moves(scored, scorer.score(scored)[SCORE].to_numpy(), scored[SCORE].to_numpy())


def _round_record(round_: Round, is_kept: bool) -> RoundRecord:
    flips = round_.flips
    return RoundRecord(
        round_.round_index,
        is_kept=is_kept,
        ndcg=round_.dev_ndcg,
        auc=round_.dev_auc,
        agreement=round_.agreement,
        control_auc=round_.control_auc,
        gain_error=round_.gain_error,
        flipped_share=flips.share if flips else None,
        flips_right=flips.precision if flips else None,
        random_flips_right=flips.wrong_share if flips else None,
    )


def _stage_record(folder: Path) -> StageRecord:
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    history = read_history(folder)
    losses = {
        task: points
        for task in TASKS
        if (points := [(entry["step"], entry[f"{task}_loss"]) for entry in history if f"{task}_loss" in entry])
    }
    dev = {
        label: points
        for name, label in METRICS.items()
        if (points := [(entry["step"], entry[f"dev_{name}"]) for entry in history if f"dev_{name}" in entry])
    }
    return StageRecord(
        folder.name,
        num_packs=card["num_packs"],
        settings=card["tuning"],
        losses=losses,
        dev=dev,
        kept=kept_step(history, card.get("kept_step")),
    )


def format_training(result: TrainingResult) -> str:
    """The result as plain text, one block a step."""
    blocks = []
    if result.agreement is not None:
        blocks.append(format_agreement(result.agreement))
    if result.translation is not None:
        blocks.append(format_translation(result.translation))
    if result.taught is not None:
        blocks.append(format_taught(result.taught))
    if result.distillation is not None:
        blocks.append(format_distillation(result.distillation))
    blocks.append(f"trained on {result.num_pairs} pairs, {result.length}: {result.model_dir}")
    if result.kept is not None:
        blocks.append(f"{result.kept}.")
    if result.evaluation is not None:
        blocks.append(format_evaluation(result.evaluation))
    blocks.append(f"report: {result.report_path}")
    return "\n".join(blocks)


def format_agreement(agreement: Agreement) -> str:
    """How far judges agree: a line of all, and one of each judge, or of those with the most labels."""
    shared = f"{agreement.num_shared / agreement.num_pairs:.1%} of {agreement.num_pairs:,} pairs have more than one"
    lines = [f"judges: {len(agreement.judges)}; {shared}"]
    if agreement.agreement is not None:
        kappa = "" if agreement.kappa is None else f", Fleiss' kappa {agreement.kappa:.2f}"
        lines[0] += f"; two of a pair agree in {agreement.agreement:.1%}{kappa}"
    for judge in agreement.shown_judges:
        agrees = "" if judge.agreement is None else f", agrees with the others in {judge.agreement:.1%}"
        name = "(without a name)" if judge.name is None else judge.name
        lines.append(f"  {name}: {judge.num_labels:,} labels, mean weight {judge.mean_weight:g}{agrees}")
    if num_more := len(agreement.judges) - len(agreement.shown_judges):
        lines.append(f"  and {num_more:,} more with fewer labels")
    return "\n".join(lines)


def format_taught(taught: TaughtPairs) -> str:
    """One line: the pairs that a teacher scored, and how well its scores tell labels."""
    trusted = "assumed, for too few judged pairs have a score"
    if taught.num_judged:
        auc = "" if taught.auc is None else f", ROC-AUC {taught.auc:.3f}"
        trusted = f"by {taught.num_judged:,} judged pairs{auc}"
    return f"teacher: {taught.num_pairs:,} pairs without a label to learn; label probabilities {trusted}"


def format_translation(result: TranslationResult) -> str:
    """One line: the texts that were trained on, those left out, and how well held-out ones are translated."""
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.num_left_out.items())) or "none"
    texts = f"translation: {result.num_texts:,} pairs of texts to learn from, left out: {left_out}"
    quality = result.quality
    if quality is None:
        return f"{texts}; not measured, for {result.why_unmeasured}"
    return (
        f"{texts}; {quality.num_texts} held-out texts: loss {quality.loss:.2f} "
        f"({quality.loss_without_source:.2f} without the source), chrF {quality.chrf:.1f}"
    )


def format_distillation(result: DistillationResult) -> str:
    """The table of rounds, and the clearest of the given labels that look wrong."""
    issues = result.label_issues
    lines = [format_rounds(result.rounds, result.best)]
    lines.append(f"{len(issues):,} given labels look wrong, the clearest first: {result.issues_path}")
    if result.teachers_saw_labels:
        lines.append(
            "  (to a model that has learnt them: with num_folds 2 or more, models judge labels that they never saw)"
        )
    for row in issues.head(NUM_SHOWN_ISSUES).itertuples():
        lines.append(f"  {row.market}  {row.query}  |  {row.title}: given {row.grade}, rather {row.suggested_label}")
    return "\n".join(lines)


def format_rounds(rounds: Sequence[Round], best: Round) -> str:
    """A table: one line a round. Columns that no round has are left out."""
    columns = {
        "round": [str(round_.round_index) for round_ in rounds],
        f"dev {QUERY_METRICS[0]}": [_number(round_.dev_ndcg, ".4f") for round_ in rounds],
        f"dev {PAIR_METRICS[0]}": [_number(round_.dev_auc, ".4f") for round_ in rounds],
        "control": [_number(round_.control_auc, ".4f") for round_ in rounds],
        "agreement": [_number(round_.agreement, ".4f") for round_ in rounds],
        "error of gain": [_number(round_.gain_error, ".4f") for round_ in rounds],
        "doubted": [_number(round_.doubts.share if round_.doubts else None, ".1%") for round_ in rounds],
        "of these wrong": [_number(round_.doubts.precision if round_.doubts else None, ".1%") for round_ in rounds],
        "of all wrong": [_number(round_.doubts.wrong_share if round_.doubts else None, ".1%") for round_ in rounds],
        "flipped": [_number(round_.flips.share if round_.flips else None, ".1%") for round_ in rounds],
        "repaired": [_number(round_.flips.repaired if round_.flips else None, ".1%") for round_ in rounds],
        "calibration error": [_calibration_error(round_.calibration) for round_ in rounds],
        "on dev": [_calibration_error(round_.dev_calibration) for round_ in rounds],
        "pseudo-labels": [_number(round_.num_unlabelled or None, ",") for round_ in rounds],
    }
    shown = {name: texts for name, texts in columns.items() if any(texts)}
    widths = [max(map(len, (name, *texts))) for name, texts in shown.items()]
    lines = [
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in zip(*([name, *texts] for name, texts in shown.items()), strict=True)
    ]
    lines[1 + best.round_index] += "  kept"
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _calibration_error(calibration: Calibration | None) -> str:
    return "" if calibration is None else f"{calibration.expected_error:.3f}"
