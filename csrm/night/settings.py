"""Settings of a night, and the constants that its layout follows from."""

from typing import Annotated

from pydantic import ConfigDict, Field

from csrm.config import InputSpec, Markets, Settings, TablesSettings
from csrm.night.audit import AuditLimits

LEASE_SECONDS = 60.0
"""Seconds without a sign of life after which a holder has lost its lease."""
LeaseSeconds = Annotated[float, Field(gt=1)]
"""Seconds for which a lease holds; every job that takes leases has this bound."""
NUM_BUCKETS = 1_024
"""Parts of a night, the smallest amount of work that is staged in one commit."""
PAIRS_PER_TASK = 4_096
"""Pairs of one scoring task in a large night, and so rows of one staged file."""
FEWEST_PAIRS_PER_TASK = 256
"""Pairs of one scoring task in a small night."""
PRODUCTS_PER_CHUNK = 256
"""Products of one query that stay together; see ScoringConfig.products_per_chunk."""
BROADCAST_LIMIT_MB = 256
"""See ScoringConfig.broadcast_limit_mb."""
BYTES_PER_TITLE = 64
"""Bytes that Spark adds to the text of a retrieved title: offsets, lengths, the array's share."""


class NightSettings(TablesSettings):
    """The settings that a check of a night needs: its tables, its bundle, its device."""

    bundle: str
    """Folder of the bundle, the same path on every machine; or its URI, fetched once to each machine."""
    bundle_digest: str | None = None
    """Digest that the bundle must have, or its first characters; default: any."""
    device: str = "cpu"
    """cpu; cuda, which is the GPU that Spark gives a task, or the first one; or cuda:<number>."""
    one_task_per_gpu: bool | None = None
    """Whether a task that scores has a GPU for itself, while joins use every core (stage-level scheduling); default:
    where the device is cuda and spark.executor.resource.gpu.amount is set."""


class CheckedNight(NightSettings):
    """The same, read from the scoring job's file: its other settings are left to the night."""

    model_config = ConfigDict(extra="ignore")


class ScoringInputs(Settings):
    """Where the input tables are."""

    catalog: InputSpec
    queries: InputSpec
    candidates: InputSpec | None = None
    """Default: the table that build_candidates wrote into `tables`."""
    retrieval_table: InputSpec | None = None
    """Default: the table that build_retrieval_table wrote into `tables`."""
    judgments: InputSpec | None = None
    """Human grades of pairs: a new bundle's nDCG is compared with the published one's. Default: not compared."""


class ScoringConfig(NightSettings):
    """Settings of the scoring job."""

    markets: Markets
    """Market to the language of its queries that name none (BCP 47)."""
    inputs: ScoringInputs
    tokens_per_call: int | None = Field(default=None, ge=1)
    """Most tokens of one forward pass; halved where memory does not suffice. Default: 16,384 on a GPU, else 1,024."""
    use_retrieved_titles: bool = True
    """Whether retrieved titles augment the queries."""
    label_probabilities: bool = False
    """Whether rows get the probability of each label too. The first night with it scores the published pairs again that
    have none; without it, new rows have none."""
    broadcast_limit_mb: int = Field(default=BROADCAST_LIMIT_MB, ge=0)
    """Retrieved titles up to this size (estimated, MiB) are broadcast; larger ones are joined by a shuffle."""
    num_partitions: int | None = Field(default=None, ge=1)
    """Partitions to score; default: see num_scoring_partitions."""
    products_per_chunk: int = Field(default=PRODUCTS_PER_CHUNK, ge=1)
    """Products of one query that are scored side by side; a query with more is spread over partitions."""
    chunk_minutes: float = Field(default=10.0, gt=0)
    """About so much work is staged in one commit; a run that dies loses no more of it. Below a minute the start of each
    chunk takes more than its pairs."""
    canary_pairs: int = Field(default=100, ge=0)
    """Unchanged pairs of each market that are scored again, and must have the score that is published."""
    audit: AuditLimits = AuditLimits()
    """Where the audit keeps a run from being published."""
    hang_minutes: float = Field(default=30.0, gt=0)
    """A worker that gives back no scores for so long is ended, and its task tried again; a pair at which that happens
    again is set aside."""
    lease_seconds: LeaseSeconds = LEASE_SECONDS
    """A run that was silent for so long has lost its markets to whoever asks next."""
