"""Why a pair has its score: what the model reads of it, and the score without each part."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from csrm.scoring.labels import softmax
from csrm.scoring.prompts import neutralize
from csrm.scoring.scorer import PAIR_COLUMNS, PairScorer, pair_texts

PLACE = ("market", "language")
"""Parts of every prompt that are never left out: without them it would be another kind of prompt."""


def explain(scorer: PairScorer, pair: Mapping[str, Any]) -> pd.DataFrame:
    """What the model reads of a pair, and what each part of it does to the score.

    A part is left out alone, and the pair is scored again. Parts act together: their effects do not add up to the
    score. Two titles that say the same can both have an effect of 0.

    Args:
        scorer: of a bundle, see load_scorer.
        pair: market, language, query and title, and what there is of retrieved_titles, brand, category and attributes;
            see PairScorer.score.

    Returns:
        One row for each part of the prompt, in its order: field, text (what the model reads), cut (what the budgets cut
        off), num_tokens, score_without (NaN for market and language) and effect (the score less score_without: above 0
        where the part raises the score), all float64. The score itself is in `attrs["relevance_score"]`, and what each
        voter says in `attrs["votes"]`: see PairScorer.votes.

    Raises:
        InputError: a column is missing, or a value is nothing that an input table may hold.

    >>> from csrm.bundle import load_scorer
    >>> scorer = load_scorer("conf/demo_bundle", "cpu")
    >>> pair = {"market": "us", "language": "en", "query": "wireless mouse", "title": "Silent Wireless Mouse"}
    >>> parts = explain(scorer, {**pair, "brand": "Norvia"})
    >>> parts["field"].tolist()
    ['market', 'language', 'query', 'title', 'brand']
    >>> parts["text"].tolist()
    ['us', 'en', 'wireless mouse', 'Silent Wireless Mouse', 'Norvia']
    """
    whole = pd.DataFrame([dict(pair)])
    ((query, product),) = pair_texts(whole)
    parts = scorer.tokenizer.prompt_parts(query, product)
    variants, rank = [{name: whole.iloc[0].get(name) for name in PAIR_COLUMNS}], -1
    titles = [title for title in query.retrieved_titles if neutralize(title)]  # the others leave no line
    for part in parts:
        without = dict(variants[0])
        if part.field == "retrieved_title":
            rank += 1
            without["retrieved_titles"] = [title for number, title in enumerate(titles) if number != rank]
        elif part.field not in PLACE:
            without[part.field] = None
        variants.append(without)
    scores = scorer.score_parts(pd.DataFrame(variants)).astype(np.float64)
    frame = pd.DataFrame(parts, columns=["field", "text", "cut", "num_tokens"])
    frame["score_without"] = np.where(frame["field"].isin(PLACE), np.nan, scores[1:])
    frame["effect"] = scores[0] - frame["score_without"]
    frame.attrs["relevance_score"] = float(scores[0])
    frame.attrs["votes"] = {str(name): float(value) for name, value in scorer.votes(whole).iloc[0].items()}
    return frame


def label_probabilities(scorer: PairScorer, pairs: pd.DataFrame) -> pd.DataFrame:
    """Probability of each label, by its name, on the index of the pairs (see PairScorer.score); a row's sum is 1.

    >>> from csrm.bundle import load_scorer
    >>> scorer = load_scorer("conf/demo_bundle", "cpu")
    >>> pairs = pd.DataFrame({"market": "us", "language": "en", "query": "mouse", "title": ["Mouse Pad XL"]})
    >>> label_probabilities(scorer, pairs).columns.tolist()
    ['I', 'C', 'S', 'E']
    """
    names = [label.name for label in scorer.labels]
    return pd.DataFrame(softmax(scorer.logits(pairs)), columns=names, index=pairs.index)
