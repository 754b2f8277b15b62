"""What an evaluation says of the pairs that it cannot compare."""

import numpy as np
import pandas as pd
import pytest

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.operations.evaluation import EvaluationConfig, EvaluationInputs, pairs_left_out

SPEC = InputSpec(path="x")
INPUTS = EvaluationInputs(judgments=SPEC, catalog=SPEC, queries=SPEC, compare={"engine": InputSpec(path="engine")})


def config(encoder: str | None) -> EvaluationConfig:
    return EvaluationConfig(
        markets={"us": "en"},
        inputs=INPUTS,
        tables="tables",
        output="out",
        gains={"E": 1.0, "I": 0.0},
        relevant_grades=("E",),
        irrelevant_grades=("I",),
        baseline_encoder=encoder,
    )


def test_pairs_without_a_cosine_are_counted_as_those_of_other_rankings_are() -> None:
    judged = pd.DataFrame(
        {
            "relevance_score": [0.5, 0.25, np.nan, 0.75],
            "engine": [1.0, np.nan, np.nan, 3.0],
            "encoder": [np.nan, np.nan, np.nan, 0.9],  # the third is not published
        }
    )

    assert pairs_left_out(judged, config("build/e5")) == [
        "engine has no score for 1 of 3 judged pairs; they are left out of all rankings.",
        "encoder has no score for 2 of 3 judged pairs; they are left out of all rankings.",
    ]
    assert len(pairs_left_out(judged.drop(columns="encoder"), config(None))) == 1
    with pytest.raises(InputError, match=r"baseline_encoder 'build/e5': expected scores of .* none of the 3 .*texts"):
        pairs_left_out(judged.assign(encoder=np.nan), config("build/e5"))
