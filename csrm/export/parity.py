"""Proof that two scorers of one model agree, and that a score does not depend on the pack that it is computed in."""

import numpy as np
import pandas as pd

from csrm.bundle.contents import Parity
from csrm.errors import ParityError
from csrm.scoring.labels import Label, expected_gain
from csrm.scoring.scorer import PackScorer, PairScorer
from csrm.scoring.tokenization import PromptTokenizer
from csrm.scoring.vote import Vote

SCORE_TOLERANCE = 1e-4
"""Largest difference of a score between torch and the fp32 graph, and between adapters beside and inside of weights."""
NUM_PACKINGS = 20


def check_parity(pairs: pd.DataFrame, expected: PairScorer, actual: PairScorer, tolerance: float) -> Parity:
    """Compare two scorers.

    Args:
        pairs: see csrm.scoring.PAIR_COLUMNS.
        tolerance: largest difference between two relevance scores.

    Raises:
        ParityError: a score differs by more (the message shows the worst pair), or is not finite.
    """
    logits = [scorer.logits(pairs) for scorer in (expected, actual)]
    return compare_logits(pairs, logits[0], logits[1], expected.labels, (expected.provider, actual.provider), tolerance)


def compare_logits(
    pairs: pd.DataFrame,
    expected: np.ndarray,
    actual: np.ndarray,
    labels: tuple[Label, ...],
    names: tuple[str, str],
    tolerance: float,
) -> Parity:
    """What check_parity does, for logits that are there already, each of shape (num_pairs, num_labels)."""
    if not (np.isfinite(expected).all() and np.isfinite(actual).all()):
        raise ParityError("parity: a logit is not a finite number. The bundle was not written.")
    gains = np.array([label.gain for label in labels])
    scores = [expected_gain(logits, gains) for logits in (expected, actual)]
    differences = np.abs(scores[0] - scores[1])
    margins = expected[:, -1] - expected[:, 0]
    parity = Parity(
        num_pairs=len(pairs),
        largest_score_difference=float(differences.max()),
        largest_logit_difference=float(np.abs(expected - actual).max()),
        logit_margin_std=float(margins.std()),
        tolerance=tolerance,
    )
    if not parity.largest_score_difference <= tolerance:
        worst = int(differences.argmax())
        pair = pairs.iloc[worst]
        raise ParityError(
            f"parity: pair {worst} of {len(pairs)} (query {pair['query']!r}, product {pair['title']!r}) scores "
            f"{scores[0][worst]:.6f} with {names[0]} and {scores[1][worst]:.6f} with {names[1]}; "
            f"allowed difference {tolerance}. The bundle was not written."
        )
    return parity


def pack_spread(
    pairs: pd.DataFrame,
    tokenizer: PromptTokenizer,
    labels: tuple[Label, ...],
    pack_scorer: PackScorer,
    tokens_per_call: int,
    num_packings: int = NUM_PACKINGS,
    vote: Vote | None = None,
) -> float:
    """Largest difference of one pair's score over packs of other sizes with other pairs in another order.

    Args:
        pairs: see csrm.scoring.PAIR_COLUMNS; every one is scored in every packing.
        tokens_per_call: most tokens of a pack; packings have that many, down to one prefix with one suffix.
        vote: beside the model, whose encoder embeds the texts anew for each packing; None: there is none.
    """
    rng = np.random.default_rng(0)
    longest = tokenizer.budgets.prompt
    scores = np.empty((num_packings, len(pairs)))
    for row in scores:
        order = rng.permutation(len(pairs))
        scorer = PairScorer(
            tokenizer,
            labels,
            pack_scorer=pack_scorer,
            tokens_per_call=int(rng.integers(longest, max(longest, tokens_per_call) + 1)),
        )
        if vote is not None:
            vote.voters.forget()
            scorer.vote = vote
        row[order] = scorer.score_parts(pairs.iloc[order])
    return float(np.ptp(scores, axis=0).max())
