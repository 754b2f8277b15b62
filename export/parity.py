"""Proof that two scorers of one model agree."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd

from csrm.errors import ParityError
from csrm.labels import expected_gain
from csrm.scoring import PairScorer

SCORE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Parity:
    """How far two scorers are apart on the same pairs."""

    num_pairs: int
    largest_score_difference: float
    largest_logit_difference: float
    logit_margin_std: float
    """Standard deviation over the pairs of the last label's logit minus the first's: near 0, any two models agree."""
    tolerance: float

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def check_parity(pairs: pd.DataFrame, expected: PairScorer, actual: PairScorer, tolerance: float) -> Parity:
    """Compare two scorers.

    Args:
        pairs: see csrm.scoring.PAIR_COLUMNS.
        tolerance: largest difference between two relevance scores.

    Raises:
        ParityError: a score differs by more (the message shows the worst pair), or is not finite.
    """
    logits = [scorer.logits(pairs) for scorer in (expected, actual)]
    if not all(np.isfinite(values).all() for values in logits):
        raise ParityError("parity: a logit is not a finite number. The bundle was not written.")
    gains = np.array([label.gain for label in expected.labels])
    scores = [expected_gain(values, gains) for values in logits]
    differences = np.abs(scores[0] - scores[1])
    margins = logits[0][:, -1] - logits[0][:, 0]
    parity = Parity(
        num_pairs=len(pairs),
        largest_score_difference=float(differences.max()),
        largest_logit_difference=float(np.abs(logits[0] - logits[1]).max()),
        logit_margin_std=float(margins.std()),
        tolerance=tolerance,
    )
    if not parity.largest_score_difference <= tolerance:
        worst = int(differences.argmax())
        pair = pairs.iloc[worst]
        raise ParityError(
            f"parity: pair {worst} of {len(pairs)} (query {pair['query']!r}, product {pair['title']!r}) scores "
            f"{scores[0][worst]:.6f} with {expected.provider} and {scores[1][worst]:.6f} with {actual.provider}; "
            f"allowed difference {tolerance}. The bundle was not written."
        )
    return parity
