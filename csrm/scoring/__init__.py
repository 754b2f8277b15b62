"""A pair becomes a score, with neither Spark nor torch.

Read labels, prompts, tokenization, packing, scorer, vote (words and an encoder beside the model),
runtime (ONNX Runtime), then attempts (notes against crashes) and
explanation (what each part of a prompt does).
Phrasebook puts texts into another language, for training and for the launch report.
Every room that scores may import it, in Spark or in training. It imports ground files only.
"""

from csrm.scoring.explanation import explain, label_probabilities
from csrm.scoring.labels import Label, expected_gain
from csrm.scoring.prompts import Product, Query
from csrm.scoring.scorer import PAIR_COLUMNS, PackScorer, PairScorer
from csrm.scoring.tokenization import Budgets, PromptTokenizer

__all__ = [
    "PAIR_COLUMNS",
    "Budgets",
    "Label",
    "PackScorer",
    "PairScorer",
    "Product",
    "PromptTokenizer",
    "Query",
    "expected_gain",
    "explain",
    "label_probabilities",
]
