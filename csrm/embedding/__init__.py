"""The encoder: an exported model folder that turns texts into vectors.

Read contents (what its manifest holds), then encoder (texts to vectors).
The rooms bundle, spark and export may import it. It imports artefacts, scoring and ground files.
"""

from csrm.embedding.contents import EncoderSettings
from csrm.embedding.encoder import Encoder, load_encoder

__all__ = ["Encoder", "EncoderSettings", "load_encoder"]
