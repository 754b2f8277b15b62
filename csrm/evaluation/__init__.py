"""How well scores rank products, against human grades.

Read metrics (the numbers and their intervals), then calibration (what a score means), report (text and JSON) and
examples (queries and pairs to look at).
The rooms night, operations, training and export may import it. It imports ground files only.
"""

from csrm.evaluation.calibration import calibrated_probability, calibration, threshold_metrics
from csrm.evaluation.metrics import Evaluation, evaluate_scores
from csrm.evaluation.report import format_evaluation

__all__ = [
    "Evaluation",
    "calibrated_probability",
    "calibration",
    "evaluate_scores",
    "format_evaluation",
    "threshold_metrics",
]
