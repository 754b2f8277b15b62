"""How well scores rank products, against human grades.

Read metrics (the numbers and their intervals), then report (text, plot and JSON).
The rooms night, operations, training and export may import it. It imports ground files only.
"""

from csrm.evaluation.metrics import Evaluation, evaluate_scores
from csrm.evaluation.report import format_evaluation

__all__ = ["Evaluation", "evaluate_scores", "format_evaluation"]
