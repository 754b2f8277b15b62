"""CSRM: search relevance for markets without labels.

Three lines give the score of a pair:

>>> import csrm, pandas as pd
>>> scorer = csrm.load_scorer("conf/demo_bundle", "cpu")
>>> pair = {"market": "us", "language": "en", "query": "wireless mouse", "title": ["Silent Wireless Mouse 2.4G"]}
>>> 0 <= scorer.score(pd.DataFrame(pair))["relevance_score"].item() <= 1
True

`import csrm` is cheap: a name is imported from its room when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "CsrmError",
    "PairScorer",
    "__version__",
    "explain",
    "load_bundle",
    "load_scorer",
    "relevance_score_udf",
]

if TYPE_CHECKING:
    from csrm.bundle.loading import Bundle, load_bundle, load_scorer
    from csrm.errors import CsrmError
    from csrm.scoring.explanation import explain
    from csrm.scoring.scorer import PairScorer
    from csrm.spark.scoring import relevance_score_udf
else:
    _HOMES = {
        "Bundle": "csrm.bundle.loading",
        "CsrmError": "csrm.errors",
        "PairScorer": "csrm.scoring.scorer",
        "explain": "csrm.scoring.explanation",
        "load_bundle": "csrm.bundle.loading",
        "load_scorer": "csrm.bundle.loading",
        "relevance_score_udf": "csrm.spark.scoring",
    }

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'csrm' has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(import_module(_HOMES[name]), name)

    def __dir__():
        return sorted({*globals(), *__all__})
