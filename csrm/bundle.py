"""A bundle: a folder with everything that scores pairs, the same on every machine.

| file | what |
| --- | --- |
| model.onnx (and model.onnx.data) | packed graph: PackBatch's model inputs to `logits` (packs, pairs, labels) |
| tokenizer.json | tokenizer |
| bundle.json | BundleSettings: labels, budgets, template, where the model comes from |
| parity.json | how far the graph's scores are from those of the trained model |
| manifest.json | sha256 of each file, and the digest of the whole, which names the bundle |
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from csrm.errors import BundleError, CsrmError
from csrm.labels import Label
from csrm.manifest import verify_manifest
from csrm.prompts import TEMPLATE_VERSION
from csrm.scoring import PairScorer
from csrm.tokenization import Budgets, PromptTokenizer

KIND = "bundle"
FORMAT_VERSION = 1
MODEL_NAME = "model.onnx"
TOKENIZER_NAME = "tokenizer.json"
SETTINGS_NAME = "bundle.json"
PARITY_NAME = "parity.json"


@dataclass(frozen=True)
class BundleSettings:
    """What `bundle.json` holds."""

    labels: tuple[Label, ...]
    budgets: Budgets
    pack_tokens: int
    """Most tokens of a pack."""
    base_model: str
    """Name of the model that was trained."""
    precision: str
    """fp32, ..."""
    versions: dict[str, str]
    """Package to version that made the bundle."""
    format_version: int = FORMAT_VERSION
    template_version: int = TEMPLATE_VERSION

    def __post_init__(self) -> None:
        longest = self.budgets.prefix + self.budgets.suffix
        if self.pack_tokens < longest:
            raise BundleError(
                f"pack_tokens is {self.pack_tokens}, but a prefix with one suffix may take {longest} tokens. "
                "Raise pack_tokens or lower the budgets."
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "BundleSettings":
        """Raises:
        BundleError: not the settings of a bundle that this version reads.
        """
        try:
            values = json.loads(text)
            versions = {"format_version": FORMAT_VERSION, "template_version": TEMPLATE_VERSION}
            for name, expected in versions.items():
                if values[name] != expected:
                    raise BundleError(
                        f"{SETTINGS_NAME}: {name} is {values[name]!r}, this CSRM reads {expected}. "
                        "Export the model again."
                    )
            values["labels"] = tuple(Label(**label) for label in values["labels"])
            values["budgets"] = Budgets(**values["budgets"])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BundleError(f"{SETTINGS_NAME}: is not the settings of a bundle ({error!r}).") from error


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files are as they were exported."""

    folder: Path
    settings: BundleSettings
    digest: str

    def prompt_tokenizer(self) -> PromptTokenizer:
        return PromptTokenizer.from_file(self.folder / TOKENIZER_NAME, self.settings.budgets)


def load_bundle(folder: str | Path) -> Bundle:
    """Open a bundle and check every file's digest.

    Raises:
        BundleError: a file is missing or changed, or the bundle is for another version of CSRM.
    """
    folder = Path(folder)
    digest = verify_manifest(folder, KIND)
    try:
        settings = BundleSettings.from_json((folder / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, CsrmError) as error:
        raise BundleError(f"bundle {str(folder)!r}: {error}") from error
    return Bundle(folder, settings, digest)


def load_scorer(folder: str | Path, device: str, threads: int | None = None) -> PairScorer:
    """Scorer of a bundle on a device.

    Args:
        folder: the bundle.
        device: cpu, cuda, or cuda:<number>.
        threads: threads of one forward pass on the CPU; None for one per core.

    Raises:
        BundleError: see load_bundle.
        DeviceError: the device is not there, or the runtime would use another one.
    """
    from csrm.onnx_backend import load_pack_scorer  # onnxruntime is needed to score, not to read a bundle

    bundle = load_bundle(folder)
    pack_scorer, provider = load_pack_scorer(bundle.folder / MODEL_NAME, device, threads)
    return PairScorer(
        tokenizer=bundle.prompt_tokenizer(),
        labels=bundle.settings.labels,
        pack_scorer=pack_scorer,
        pack_tokens=bundle.settings.pack_tokens,
        digest=bundle.digest,
        provider=provider,
    )
