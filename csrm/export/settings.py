"""Settings of the export."""

from typing import Literal

from pydantic import Field, model_validator

from csrm.artefacts.tracking import Tracker
from csrm.config import InputSpec, Markets, Settings
from csrm.export.ensemble import Ensemble
from csrm.export.source import Reranker
from csrm.export.vote import VoteSettings


class ExportInputs(Settings):
    """Tables whose pairs prove a bundle."""

    catalog: InputSpec
    queries: InputSpec
    judgments: InputSpec | None = None
    """Labelled pairs, which the quality gate ranks too."""
    candidates: InputSpec | None = None
    """Pairs that prove the bundle where there are no judgments."""
    retrieval_table: InputSpec | None = None
    """Titles that augment the queries; without it, queries are not augmented."""
    labels_from_behaviour: bool = False
    """Grades were made of clicks or purchases; see csrm.training.data.judged.JudgedInputs."""

    @model_validator(mode="after")
    def _has_pairs(self) -> "ExportInputs":
        if self.judgments is None and self.candidates is None:
            raise ValueError("name judgments, or candidates where there are none: the proof takes their pairs")
        return self


class ExportConfig(Settings):
    """Settings of the export."""

    model_dir: str | None = None
    """Folder that jobs/train.py wrote."""
    reranker: Reranker | None = None
    """A model that others trained to judge relevance, exported as it is; in place of model_dir."""
    ensemble: Ensemble | None = None
    """Bundles that become one, whose score is the weighted mean of theirs; in place of model_dir."""
    vote: VoteSettings | None = None
    """What votes in each score beside the model: the words that a product names, an encoder, or both."""
    bundle_dir: str
    """Where the bundle goes; replaced, in one piece, when the proof holds."""
    markets: Markets
    """Market to language: whose pairs the proof runs over."""
    inputs: ExportInputs
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
    grade_costs: dict[str, dict[str, float]] | None = None
    """What mistakes of the predicted grade cost: true label to predicted grade to its cost, where that is not 1. The
    grade of least expected cost is then predicted. Default: the most probable label."""
    tracking: Tracker | None = None
    """mlflow: the bundle goes to MLflow too, into the run of its training, and becomes a version of a registered model
    with its card; see csrm.artefacts.tracking."""
    registered_model_name: str = Field(default="csrm", pattern=r"^[^/:@]+$")
    """Name of that registered model. `bundle: models:/csrm/3` or `bundle: models:/csrm@alias` then names the bundle."""

    @model_validator(mode="after")
    def _has_one_model(self) -> "ExportConfig":
        if sum(given is not None for given in (self.model_dir, self.reranker, self.ensemble)) != 1:
            raise ValueError(
                "name one of model_dir, a trained folder, reranker, a model as it is, and ensemble, bundles to join"
            )
        if self.ensemble is not None and len(self.ensemble.bundles) == 1 and self.vote is None:
            raise ValueError("ensemble: expected two bundles, or one and a section vote; got one bundle alone")
        if self.ensemble is not None and self.grade_costs is not None:
            raise ValueError("grade_costs: an ensemble has those of its bundles; set them where these are exported")
        return self

    @property
    def model(self) -> str | Reranker:
        """What is exported, where it is no ensemble."""
        model = self.model_dir if self.reranker is None else self.reranker
        assert model is not None
        return model
