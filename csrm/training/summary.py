"""The result of a training for people: a report, and a table of rounds."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from csrm.evaluation.metrics import PAIR_METRICS, QUERY_METRICS
from csrm.scoring.scorer import PairScorer
from csrm.training.distillation.label_quality import Calibration
from csrm.training.distillation.rounds import (
    Round,
    best_round,
)
from csrm.training.model.relevance import TASKS
from csrm.training.report import RoundRecord, StageRecord, largest_moves, reliability, report_html
from csrm.training.settings import TrainConfig, grade_gains
from csrm.training.trained import trained_scorer


def write_report(
    config: TrainConfig,
    scorer: PairScorer,
    dev_pairs: pd.DataFrame,
    rounds: Sequence[Round],
    issues: pd.DataFrame | None,
    stages_dir: Path,
) -> Path:
    """Write the one-page report of the run; returns where it is."""
    model_dir = Path(config.model_dir)
    best = best_round(rounds, config.distillation.min_gain) if config.distillation is not None else None
    trained = [one.model_dir for one in rounds if one is best or one.dev_auc is not None]  # others: teachers alone
    folders = [stages_dir / "translation"] if config.translation is not None else []
    folders += trained or [model_dir]
    calibration = moves = None
    if not dev_pairs.empty:
        scores = scorer.score(dev_pairs)["relevance_score"].to_numpy()
        _, relevant, _ = grade_gains(config)
        calibration = reliability(scores, dev_pairs["grade"].isin(relevant).to_numpy())
        if best is not None and best.round_index and rounds[0].model_dir in trained:
            first_scorer = trained_scorer(rounds[0].model_dir, config.tuning.precision)
            before = first_scorer.score(dev_pairs)["relevance_score"].to_numpy()
            moves = largest_moves(dev_pairs, before, scores)
    page = report_html(
        f"Training of {model_dir.name}",
        stages=[_stage_record(folder) for folder in folders],
        rounds=[
            RoundRecord(
                one.round_index,
                is_kept=one is best,
                ndcg=one.dev_ndcg,
                auc=one.dev_auc,
                agreement=one.agreement,
                control_auc=one.control_auc,
                gain_error=one.gain_error,
                flipped_share=one.flips.share if one.flips else None,
                flips_right=one.flips.precision if one.flips else None,
                random_flips_right=one.flips.wrong_share if one.flips else None,
            )
            for one in rounds
        ],
        reliability=calibration,
        label_issues=issues,
        moves=moves,
    )
    stages_dir.mkdir(parents=True, exist_ok=True)
    path = stages_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _stage_record(folder: Path) -> StageRecord:
    card = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    losses = {
        task: points
        for task in TASKS
        if (points := [(entry["step"], entry[f"{task}_loss"]) for entry in history if f"{task}_loss" in entry])
    }
    return StageRecord(folder.name, num_packs=card["num_packs"], settings=card["tuning"], losses=losses)


def format_rounds(rounds: Sequence[Round], best: Round) -> str:
    """A table: one line a round. Columns that no round has are left out."""
    columns = {
        "round": [str(one.round_index) for one in rounds],
        f"dev {QUERY_METRICS[0]}": [_number(one.dev_ndcg, ".4f") for one in rounds],
        f"dev {PAIR_METRICS[0]}": [_number(one.dev_auc, ".4f") for one in rounds],
        "control": [_number(one.control_auc, ".4f") for one in rounds],
        "agreement": [_number(one.agreement, ".4f") for one in rounds],
        "error of gain": [_number(one.gain_error, ".4f") for one in rounds],
        "doubted": [_number(one.doubts.share if one.doubts else None, ".1%") for one in rounds],
        "of these wrong": [_number(one.doubts.precision if one.doubts else None, ".1%") for one in rounds],
        "of all wrong": [_number(one.doubts.wrong_share if one.doubts else None, ".1%") for one in rounds],
        "flipped": [_number(one.flips.share if one.flips else None, ".1%") for one in rounds],
        "repaired": [_number(one.flips.repaired if one.flips else None, ".1%") for one in rounds],
        "calibration error": [_calibration_error(one.calibration) for one in rounds],
        "on dev": [_calibration_error(one.dev_calibration) for one in rounds],
        "pseudo-labels": [_number(one.num_unlabelled or None, ",") for one in rounds],
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
