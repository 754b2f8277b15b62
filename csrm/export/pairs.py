"""The pairs that prove a bundle: judged ones, or candidates where nobody judged any."""

import pandas as pd

from csrm.export.settings import ExportConfig
from csrm.export.trials import QUALITY_PAIRS, whole_queries
from csrm.training.data.candidates import candidate_pairs
from csrm.training.data.judged import JudgedInputs, JudgedPairs, UnlabelledInputs


def proof_pairs(config: ExportConfig) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    """Pairs whose scores are compared with torch's, and the labelled ones of the quality gate.

    Returns:
        A random sample, with csrm.scoring.PAIR_COLUMNS; and whole queries of quality_split with their grades, None
        without judgments.

    Raises:
        InputError: a table cannot be read, has problems, or has no pair that could be scored.
    """
    inputs = {name: getattr(config.inputs, name) for name in ("catalog", "queries", "retrieval_table")}
    if config.inputs.judgments is None:
        inputs["candidates"] = config.inputs.candidates
        return candidate_pairs(UnlabelledInputs(**inputs), config.markets, config.parity_pairs), None
    inputs["judgments"] = config.inputs.judgments
    judged_inputs = JudgedInputs(**inputs, labels_from_behaviour=config.inputs.labels_from_behaviour)
    with JudgedPairs(judged_inputs, config.markets) as pairs:
        sample = pairs.read(num_pairs=config.parity_pairs)
        judged = pairs.read(split=config.quality_split)
    if config.precision != "fp32" or len(judged):
        judged = whole_queries(judged, QUALITY_PAIRS)
    return sample, judged
