"""The bundle: the exported model folder that scores everywhere.

Read contents (what its manifest holds), golden (the pairs that prove it), loading, then card.
The rooms spark, night, doctor, capacity and export may import it.
It imports artefacts, scoring, embedding and ground files.
"""

from csrm.artefacts.manifest import GOLDEN_NAME, MODEL_NAME, TOKENIZER_NAME
from csrm.bundle.contents import PLOT_NAME
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
