"""Checks of what searches by meaning: the encoder of a build, and the vectors that it has already."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ConfigDict

from csrm.artefacts.cache import cache_dir
from csrm.artefacts.manifest import GOLDEN_NAME
from csrm.config import Settings, TablesSettings
from csrm.doctor.checks import Check, CheckWarning, checked
from csrm.doctor.machine import check_disk
from csrm.embedding.contents import EncoderSettings, GoldenTexts
from csrm.embedding.encoder import encoder_digest, open_encoder, read_encoder
from csrm.errors import ConfigError


class CheckedSemantic(Settings):
    """The part of `semantic` that a check needs."""

    model_config = ConfigDict(extra="ignore")

    encoder: str
    """Folder of the encoder, the same path on every machine; or its URI."""
    device: str = "cpu"
    """Device that embeds."""


class CheckedBuild(TablesSettings):
    """Settings of build_retrieval_table, build_candidates or embed_catalog: how it searches by meaning."""

    model_config = ConfigDict(extra="ignore")

    semantic: CheckedSemantic | None = None
    """As build_retrieval_table and build_candidates have it; without it they do not search by meaning."""
    encoder: str | None = None
    """As embed_catalog has it."""
    device: str = "cpu"
    """As embed_catalog has it."""

    @property
    def search(self) -> CheckedSemantic | None:
        """The encoder and its device, wherever they are named."""
        if self.semantic is not None or self.encoder is None:
            return self.semantic
        return CheckedSemantic(encoder=self.encoder, device=self.device)


def checks_of_encoder(
    search: CheckedSemantic, device: str, threads: int | None = None, digest: str | None = None
) -> Iterator[Check]:
    """What a process that embeds needs of its machine: room for the encoder, and an encoder that proves itself.

    Args:
        search: the encoder.
        device: cpu, cuda or cuda:<number>, of this process.
        threads: of one forward pass on the CPU.
        digest: that the encoder must have; None: any.
    """
    if "://" in search.encoder:
        yield checked("cache", lambda: check_disk(cache_dir(), "CSRM_CACHE_DIR"))
    found: tuple[EncoderSettings, str, Path] | None = None

    def look() -> str:
        nonlocal found
        found = read_encoder(search.encoder, digest)
        return describe_encoder(*found)

    yield checked("encoder", look)
    if found is not None:
        yield checked("embeds", check_embeds, *found, device, threads)


def describe_encoder(settings: EncoderSettings, digest: str, folder: Path) -> str:
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    about = f"{settings.model}, {settings.dimensions} dimensions"
    return f"{digest[:12]} ({about}), {size:,.1f} MB, every file whole; in {folder}"


def check_embeds(settings: EncoderSettings, digest: str, folder: Path, device: str, threads: int | None) -> str:
    encoder = open_encoder(settings, digest, folder, device, threads=threads)
    num_texts = len(GoldenTexts.read(folder / GOLDEN_NAME).texts)
    return f"{num_texts} golden texts have their vectors on {device} ({encoder.provider})"


def check_one_encoder(builds: Sequence[CheckedBuild]) -> str:
    """That all builds of one folder of tables search with one encoder, so that each text is embedded once.

    Raises:
        CheckWarning: two encoders.
    """
    digests = {search.encoder: encoder_digest(search.encoder) for build in builds if (search := build.search)}
    if len(set(digests.values())) > 1:
        listed = ", ".join(f"{digest[:12]} in {place}" for place, digest in sorted(digests.items()))
        raise CheckWarning(f"{len(set(digests.values()))} encoders: {listed}; each text is embedded by each of them")
    return f"{len(builds)} configurations name one encoder"


def require_search(builds: Sequence[CheckedBuild]) -> None:
    """Check that a build searches by meaning at all.

    Raises:
        ConfigError: none does.
    """
    if not any(build.search for build in builds):
        raise ConfigError(
            "--build: expected a configuration with semantic.encoder (build_retrieval_table, build_candidates) or "
            "encoder (embed_catalog), found none. Such builds need no check of an encoder."
        )
