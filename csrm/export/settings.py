"""Settings of the export."""

from typing import Literal

from pydantic import Field

from csrm.config import Markets, Settings
from csrm.training.data.judged import JudgedInputs


class ExportConfig(Settings):
    """Settings of the export."""

    model_dir: str
    """Folder that jobs/train.py wrote."""
    bundle_dir: str
    """Where the bundle goes; replaced, in one piece, when the proof holds."""
    markets: Markets
    """Market to language: whose pairs the proof runs over."""
    inputs: JudgedInputs
    """Real prompts for the proof, and labelled pairs for the quality gate."""
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    """auto: the fastest that passes the quality gate on the device. fp16 and bf16 are for GPUs only."""
    device: str = "cpu"
    """Device that will score, and that everything is proven on: cpu, cuda or cuda:<number>."""
    parity_pairs: int = Field(default=256, ge=1)
    """Pairs whose scores are compared with torch's, drawn at random; fewer where there are fewer."""
    quality_split: str = "dev"
    """Split whose pairs the quality gate ranks; it should not be one that the model was trained on."""
    grade_labels: dict[str, str] | None = None
    """Grade of a judgment to the name of its label; None where both have the same names."""
