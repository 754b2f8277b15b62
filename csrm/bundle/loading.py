"""Open a bundle, and make the scorer of a bundle on a device."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from csrm.artefacts.cache import fetch_folder
from csrm.artefacts.manifest import GOLDEN_NAME, MANIFEST_NAME, MODEL_NAME, TOKENIZER_NAME, load_manifest, require_same
from csrm.bundle.contents import BUNDLE_KIND, ENCODER_FOLDER, FORMAT_VERSION, BundleSettings, made_with
from csrm.bundle.golden import GoldenPairs, check_golden_pairs
from csrm.config import problems_of
from csrm.embedding.encoder import load_encoder
from csrm.errors import BundleError, ConfigError
from csrm.scoring.prompts import TEMPLATE_VERSION
from csrm.scoring.scorer import PairScorer, pair_texts
from csrm.scoring.tokenization import SEEN_TOKENS_NAME, PromptTokenizer
from csrm.scoring.vote import Vote, Voters, named_share

TOKENS_PER_CALL = {"cpu": 1_024, "cuda": 16_384}
"""Most tokens of one forward pass on a device. On a CPU they hold a usual query's group, and what attention computes of
it stays in the cache. On a GPU issuing a layer's kernels takes the same time for 512 tokens and for these."""
GOLDEN_AT_LOAD = 8
"""Golden pairs that are scored whenever a bundle is loaded: about the pairs of two packs."""
_WORDS_TOLERANCE = 1e-9
"""Of a mean of shares, which are sums of the same fractions in the same order."""


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are as they were exported. load_bundle makes one.

    >>> bundle = load_bundle("conf/demo_bundle")
    >>> bundle.settings.precision, [label.name for label in bundle.settings.labels]
    ('fp32', ['I', 'C', 'S', 'E'])
    """

    folder: Path
    settings: BundleSettings
    digest: str
    """sha256 that names the bundle: that of its manifest."""
    num_bytes: int
    """Bytes of all its files."""

    def prompt_tokenizer(self) -> PromptTokenizer:
        """Tokenizer of its prompts.

        Raises:
            BundleError: its labels are not one token each, or its template is another model's.
        """
        try:
            tokenizer = PromptTokenizer.from_file(
                self.folder / TOKENIZER_NAME, self.settings.budgets, template=self.settings.template
            )
            tokenizer.label_ids(self.settings.labels)
        except Exception as error:  # tokenizers raises Exception itself
            raise BundleError(f"bundle {str(self.folder)!r}: {TOKENIZER_NAME}: {error}") from error
        return tokenizer

    def seen_tokens(self) -> np.ndarray | None:
        """Whether the training saw each token id, bool; ids beyond its end it did not. None where nobody knows."""
        path = self.folder / SEEN_TOKENS_NAME
        if not path.exists():
            return None
        return np.unpackbits(np.frombuffer(path.read_bytes(), np.uint8)).astype(bool)

    def golden_pairs(self) -> GoldenPairs:
        """Pairs with the scores that it must give.

        Raises:
            BundleError: the file does not hold golden pairs.
        """
        return GoldenPairs.read(self.folder / GOLDEN_NAME)


def load_bundle(folder: str | Path, digest: str | None = None) -> Bundle:
    """Open a bundle and check every file's digest.

    Args:
        folder: a path, or the URI of a folder, which is fetched once and kept (see csrm.artefacts.cache).
        digest: what the bundle's digest must be, or begin with; None: any.

    Raises:
        BundleError: a file is missing or changed, the bundle is not the one that the digest names, or it is for another
            version of CSRM.

    >>> bundle = load_bundle("conf/demo_bundle")
    >>> load_bundle("conf/demo_bundle", digest=bundle.digest[:12]) == bundle
    True
    """
    folder = fetch_folder(folder, BUNDLE_KIND)
    manifest = load_manifest(folder, BUNDLE_KIND, digest)
    where = f"bundle {str(folder)!r}"
    for name, expected in (("format_version", FORMAT_VERSION), ("template_version", TEMPLATE_VERSION)):
        found = manifest.about.get(name, 1)
        if found != expected:
            raise BundleError(
                f"{where}: {name} is {found!r}, this CSRM reads {expected}. "
                "Export the model again, or use the CSRM that exported it."
            )
    try:
        settings = BundleSettings.model_validate(manifest.about)
    except ConfigError as error:
        raise BundleError(f"{where}: does not describe a bundle: {error}") from error
    except ValidationError as error:
        problems = "\n".join(problems_of(error))
        raise BundleError(f"{where}: {MANIFEST_NAME} does not describe a bundle:\n{problems}") from error
    measured = sorted({report.precision for report in settings.precisions if report.pairs_per_s})
    if settings.precision not in measured:
        raise BundleError(
            f"{where}: {MANIFEST_NAME}: precision is {settings.precision}, expected one that precisions measured: "
            f"{measured}. Export the model again."
        )
    return Bundle(folder, settings, manifest.digest, sum(entry.bytes for entry in manifest.files.values()))


def load_scorer(
    folder: str | Path,
    device: str,
    *,
    threads: int | None = None,
    digest: str | None = None,
    num_golden: int | None = GOLDEN_AT_LOAD,
    tokens_per_call: int | None = None,
) -> PairScorer:
    """Scorer of a bundle on a device, after it gave the golden scores there.

    Args:
        folder: see load_bundle.
        device: cpu, cuda, or cuda:<number>.
        threads: threads of one forward pass on the CPU, from 1; None for one per core.
        digest: see load_bundle.
        num_golden: golden pairs to score, from 1; None for all.
        tokens_per_call: most tokens of one forward pass; None: see TOKENS_PER_CALL.

    Raises:
        BundleError: see load_bundle; a golden pair has another score here, or all of them have one; or another bundle
            was put into the folder meanwhile.
        ConfigError: an unknown device, or a number is below 1.
        DeviceError: the device is not there, or the runtime would use another one.

    >>> scorer = load_scorer("conf/demo_bundle", "cpu", threads=1)
    >>> scorer.provider
    'CPUExecutionProvider'
    """
    from csrm.scoring.runtime import load_pack_scorer  # onnxruntime is needed to score, not to read a bundle

    for name, number in (("threads", threads), ("num_golden", num_golden)):
        if number is not None and number < 1:
            raise ConfigError(f"{name}: expected a whole number from 1, got {number!r}. Leave it out for the default.")
    bundle = load_bundle(folder, digest)
    settings = bundle.settings
    if settings.precision == "bf16" and device == "cpu":
        raise BundleError(
            f"bundle {str(bundle.folder)!r} is bf16, which ONNX Runtime computes on GPUs only; got device 'cpu'. Score "
            "with device cuda, or export the model again with --device cpu."
        )
    pack_scorer, provider = load_pack_scorer(bundle.folder / MODEL_NAME, device, threads)
    tokenizer = bundle.prompt_tokenizer()
    scorer = PairScorer(
        tokenizer=tokenizer,
        labels=settings.labels,
        pack_scorer=pack_scorer,
        tokens_per_call=default_tokens_per_call(device) if tokens_per_call is None else tokens_per_call,
        digest=bundle.digest,
        provider=provider,
        grade_costs=settings.grade_costs,
    )
    golden = bundle.golden_pairs()
    require_same(bundle.folder, BUNDLE_KIND, bundle.digest)
    try:
        golden.require_different(settings.golden_tolerance)
        check_golden_pairs(
            golden if num_golden is None else golden.first(num_golden),
            tokenizer,
            scorer,
            settings.golden_tolerance,
            f"{provider} of {_runtime()} ({settings.precision}; exported with {made_with(settings)})",
        )
    except BundleError as error:
        raise BundleError(f"bundle {str(bundle.folder)!r} on device {device!r}: {error}") from error
    scorer.vote = _vote(bundle, golden, device, threads)
    scorer.num_tokens = scorer.num_prompt_tokens = 0  # only what is asked for is counted
    return scorer


def _vote(bundle: Bundle, golden: GoldenPairs, device: str, threads: int | None) -> Vote | None:
    """What votes beside the bundle's model; None where nothing does. The encoder proves its golden texts.

    Raises:
        BundleError: the encoder is not the one that the bundle names, or gives other vectors here; or words are cut
            otherwise here than where the bundle was made.
    """
    vote = bundle.settings.vote
    if vote is None:
        return None
    if vote.golden_words is not None and abs(golden_words(golden) - vote.golden_words) > _WORDS_TOLERANCE:
        raise BundleError(
            f"bundle {str(bundle.folder)!r}: its golden products name {vote.golden_words:.4f} of their queries' words, "
            f"and {golden_words(golden):.4f} as this CSRM ({version('csrm')}) cuts words: its vote of words would "
            "be another one. Export the model again, or use the CSRM that exported it."
        )
    embed = None
    if vote.encoder is not None:
        folder = bundle.folder / ENCODER_FOLDER
        embed = load_encoder(folder, device, threads=threads, digest=vote.encoder.digest).embed
    voters = Voters(counts_words=vote.golden_words is not None, embed=embed)
    return Vote(voters, vote.label_map, bundle.settings.labels)


def golden_words(golden: GoldenPairs) -> float:
    """Mean share of the golden queries' words that their products name."""
    return float(np.mean([named_share(query.query, product) for query, product in pair_texts(golden.pairs)]))


def default_tokens_per_call(device: str) -> int:
    """Most tokens of one forward pass on cpu, cuda or cuda:<number>, see TOKENS_PER_CALL."""
    return TOKENS_PER_CALL[device.partition(":")[0]]


def _runtime() -> str:
    from csrm.scoring.runtime import require_one_onnxruntime

    name = require_one_onnxruntime()
    return f"{name} {version(name)}"
