"""What `manifest.json` of a bundle says under `about`, and the names of the bundle's files."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from csrm.config import Settings
from csrm.scoring.labels import Label, cost_matrix
from csrm.scoring.prompts import TEMPLATE_VERSION
from csrm.scoring.template import BUILT_IN_TEMPLATE, PromptTemplate
from csrm.scoring.tokenization import Budgets
from csrm.scoring.vote import VOTERS, LabelMap, Voter

BUNDLE_KIND = "bundle"
FORMAT_VERSION = 3
PLOT_NAME = "precisions.png"
ENCODER_FOLDER = "encoder"
MOST_TOLERANCE = 0.5
"""Of scores, which are in [0, 1]: with more, a comparison proves nothing."""
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]


class Estimate(Settings):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Quality(Settings):
    """How well the scores of one precision rank labelled pairs, against those of fp32."""

    num_pairs: int = Field(ge=0)
    num_queries: int = Field(ge=0)
    auc: float
    """ROC-AUC of the label with the highest gain."""
    ndcg: float
    """nDCG@10, mean over queries."""
    auc_loss: Estimate
    """What fp32 has more; the interval is over queries, which both precisions share."""
    ndcg_loss: Estimate
    spearman: float
    """Rank correlation with the scores of fp32."""
    largest_shift: float
    """Largest difference of a score from that of fp32."""
    mean_shift: float


class PrecisionReport(Settings):
    """One precision that the export tried."""

    precision: Precision
    recipe: str
    """How its weights are stored and multiplied."""
    num_bytes: int = Field(ge=0)
    """Size of the graph with its weights; 0 where no graph was made."""
    pairs_per_s: float = Field(ge=0)
    """Speed on the machine of the export, 0 where it did not run; compare within one bundle only."""
    pack_spread: float | None = Field(ge=0)
    """Largest difference of one pair's score between 20 packs; None where the gate had refused it before."""
    quality: Quality | None = None
    """None where no labelled pairs were given."""
    largest_activation: float | None = None
    """Largest activation of the sample in float32; float16 ends at 65,504. None where it is not of 16 bits."""
    verdict: str
    """passed, or what did not hold."""


class Parity(Settings):
    """How far the exported fp32 graph is from the trained model, over the same real pairs."""

    num_pairs: int = Field(ge=0)
    largest_score_difference: float
    largest_logit_difference: float
    logit_margin_std: float
    """Standard deviation over the pairs of the last label's logit minus the first's: near 0, any two models agree."""
    tolerance: float
    """Largest difference of two scores that was allowed."""


class TensorSpec(Settings):
    """An input or output of the graph."""

    type: str
    shape: tuple[int | str, ...]


class Origin(Settings):
    """Where the weights come from; digests are sha256."""

    base_model: str
    """Model that was trained: its name, of a folder with architecture and size."""
    base_model_files: dict[str, str]
    """File to digest."""
    adapter: str | None = None
    """Digest of the adapters that were merged into it; None where all weights were trained, or none."""
    trained_model: str | None = None
    """Digest of the trained folder; None where the base model was exported as it is."""
    training_run: str | None = None
    """Digest of all that the training follows from: packs, start and tuning."""
    ensemble: dict[str, float] | None = None
    """Digest of each bundle that it was joined of, to its share in the probabilities; None, and not written: of one
    model."""


class VotingEncoder(Settings):
    """The encoder of a bundle, in ENCODER_FOLDER."""

    digest: str
    model: str
    """Name of the model that it was exported from."""


class BundleVote(Settings):
    """What votes in each score of a bundle beside its model, see csrm.scoring.vote."""

    weights: dict[Voter, Annotated[float, Field(ge=0)]]
    """Of the features of csrm.scoring.vote.Voters: slopes of its LabelMap."""
    thresholds: tuple[float, ...] = Field(min_length=1)
    """Of each label but the least relevant one, ascending."""
    num_queries: int = Field(ge=1)
    """Judged queries that chose weights and thresholds."""
    ndcg: dict[str, float]
    """nDCG@10 on them, of each voter alone, and of all together: each half with weights that the other half chose."""
    encoder: VotingEncoder | None = None
    golden_median: float
    """Median score of the golden pairs, whose own scores are the model's alone."""
    golden_words: float | None = None
    """Mean of csrm.scoring.vote.named_share over the golden pairs; None where words do not vote."""

    @model_validator(mode="after")
    def _has_what_votes(self) -> Self:
        if "model" not in self.weights or len(self.weights) < 2:
            raise ValueError(f"weights: expected the model and another voter, got {sorted(self.weights)}")
        for name, given in (("encoder", self.encoder), ("words", self.golden_words)):
            if (name in self.weights) != (given is not None):
                raise ValueError(f"weights: expected {name} there where the vote has it, got {sorted(self.weights)}")
        return self

    @property
    def label_map(self) -> LabelMap:
        """Label probabilities by the features of csrm.scoring.vote.Voters."""
        return LabelMap(
            np.array([self.weights[name] for name in VOTERS if name in self.weights]), np.array(self.thresholds)
        )


class BundleSettings(Settings):
    """What `manifest.json` says about a bundle, under `about`."""

    format_version: int = FORMAT_VERSION
    template_version: int = TEMPLATE_VERSION
    template: PromptTemplate = BUILT_IN_TEMPLATE
    """Of its prompts; not written where it is the built-in one."""
    labels: tuple[Label, ...] = Field(min_length=2)
    grade_costs: dict[str, dict[str, float]] | None = None
    """See csrm.scoring.labels.GradeCosts; not written where there are none."""
    vote: BundleVote | None = None
    """What scores beside the model; not written where nothing does."""
    budgets: Budgets
    precision: Precision
    device: str
    """Device that it was proven on: cpu or cuda."""
    pack_tolerance: float = Field(ge=0, le=MOST_TOLERANCE)
    """How far one pair's score may differ between two packs, or two runs."""
    golden_tolerance: float = Field(ge=0, le=MOST_TOLERANCE)
    """How far a golden pair's score may be from that of the trained model."""
    golden_source: str
    """What computed the golden scores."""
    origin: Origin
    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]
    parity: Parity
    precisions: tuple[PrecisionReport, ...]
    """Those that the export tried, this bundle's own among them."""
    cpu_features: tuple[str, ...] = ()
    """Of the CPU that their speed was measured on, see csrm.scoring.runtime; empty where it is not known."""
    versions: dict[str, str]
    """Package to version that made the bundle."""

    @model_validator(mode="after")
    def _costs_are_of_labels(self) -> Self:
        if self.grade_costs is not None:
            cost_matrix(self.labels, self.grade_costs)
        return self

    @model_validator(mode="after")
    def _thresholds_are_of_labels(self) -> Self:
        if self.vote is not None and len(self.vote.thresholds) != len(self.labels) - 1:
            raise ValueError(f"vote.thresholds: expected {len(self.labels) - 1}, got {len(self.vote.thresholds)}")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, as_usual: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = as_usual(self)
        if self.template == BUILT_IN_TEMPLATE:
            del values["template"]
        if self.origin.ensemble is None:
            del values["origin"]["ensemble"]
        if self.grade_costs is None:
            del values["grade_costs"]
        if self.vote is None:
            del values["vote"]
        return values

    @property
    def report(self) -> PrecisionReport:
        """What the export measured of this bundle's own graph; of one precision, it may have tried several recipes."""
        own = [report for report in self.precisions if report.precision == self.precision]
        return next((report for report in own if report.verdict == "passed"), own[-1])


def other_cpu(settings: BundleSettings, found: Sequence[str]) -> str | None:
    """What to say where 8 or 4 bits were chosen on another kind of CPU; None where the speed that was measured holds.

    Args:
        settings: of the bundle.
        found: csrm.scoring.runtime.cpu_features of the machine that scores; empty: not known.
    """
    measured = settings.cpu_features
    if settings.device != "cpu" or settings.precision not in ("int8", "int4") or not measured or not found:
        return None
    if set(measured) == set(found):
        return None
    return (
        f"{settings.precision} was the fastest on a CPU with {', '.join(measured)}; this one has {', '.join(found)}, "
        "where another precision may be faster. Export the bundle on such a machine"
    )


def made_with(settings: BundleSettings) -> str:
    return ", ".join(f"{package} {number}" for package, number in settings.versions.items())
