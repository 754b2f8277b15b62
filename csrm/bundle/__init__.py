"""The bundle: the exported model folder that scores everywhere.

Read contents (what its manifest holds), golden (the pairs that prove it), cache (fetching it), loading, then card.
The rooms spark, night, doctor, capacity and export may import it. It imports scoring and ground files.
"""

from csrm.bundle.contents import GOLDEN_NAME, MODEL_NAME, PLOT_NAME, TOKENIZER_NAME
from csrm.bundle.loading import Bundle, load_bundle, load_scorer

__all__ = [
    "GOLDEN_NAME",
    "MODEL_NAME",
    "PLOT_NAME",
    "TOKENIZER_NAME",
    "Bundle",
    "load_bundle",
    "load_scorer",
]
