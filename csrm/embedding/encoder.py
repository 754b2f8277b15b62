"""Texts to vectors: tokens, batches of like length, one graph."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from tokenizers import Tokenizer

from csrm.artefacts.cache import fetch_folder
from csrm.artefacts.manifest import GOLDEN_NAME, MODEL_NAME, TOKENIZER_NAME, load_manifest, read_manifest, require_same
from csrm.embedding.contents import ENCODER_KIND, FORMAT_VERSION, EncoderSettings, GoldenTexts, TextKind
from csrm.errors import BundleError
from csrm.scoring.vote import cosine

TOKENS_PER_CALL = 4_096
"""Most tokens of one forward pass, with padding."""
_CHARACTERS_PER_TOKEN = 64
_TEXTS_AT_ONCE = 4_096
TextModel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Vectors of texts, shape (texts, dimensions), from token ids and attention mask, both int64 (texts, tokens)."""


class TextTokenizer:
    """Token ids of texts with their prefix. Special tokens stand only where the model's template puts them."""

    def __init__(self, tokenizer: Tokenizer, settings: EncoderSettings) -> None:
        """Make one of a model's tokenizer.

        Args:
            tokenizer: of the model; its own truncation and padding are replaced.
            settings: prefixes and length.

        Raises:
            BundleError: `max_tokens` leaves no room for a text beside the prefix and the special tokens.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        longest = max(len(tokenizer.encode(settings.prefix(kind)).ids) for kind in ("query", "passage"))
        if longest >= settings.max_tokens:
            raise BundleError(
                f"encoder: max_tokens is {settings.max_tokens}, but the prefix with special tokens takes {longest}. "
                "Raise max_tokens or shorten the prefix."
            )
        tokenizer.enable_truncation(settings.max_tokens)
        tokenizer.encode_special_tokens = True
        self._tokenizer, self._settings = tokenizer, settings

    def token_ids(self, texts: Sequence[str], kind: TextKind) -> list[list[int]]:
        """Token ids of each text, one to `max_tokens` each; a text without any has the padding token."""
        prefix, most = self._settings.prefix(kind), _CHARACTERS_PER_TOKEN * self._settings.max_tokens
        encodings = self._tokenizer.encode_batch([prefix + text[:most] for text in texts])
        return [encoding.ids or [self._settings.pad_id] for encoding in encodings]


class Encoder:
    """Vectors of texts. load_encoder makes one."""

    def __init__(
        self, tokenizer: TextTokenizer, settings: EncoderSettings, model: TextModel, *, digest: str, provider: str
    ) -> None:
        """Make one of a model.

        Args:
            tokenizer: of the model.
            settings: of the encoder.
            model: vectors of a batch of token ids.
            digest: sha256 that names the encoder; empty for a model that is not one yet.
            provider: what runs the model.
        """
        self.tokenizer, self.settings, self.digest, self.provider = tokenizer, settings, digest, provider
        self._model = model

    def embed(self, texts: Sequence[str], kind: TextKind = "passage") -> np.ndarray:
        """Vectors of texts, in their order.

        Args:
            texts: any strings; what is too long is cut off.
            kind: query for what is searched for, passage for what is found.

        Returns:
            Shape (len(texts), dimensions), float32. A text's vector depends on other texts of the same call by rounding
            alone.

        Raises:
            BundleError: the model gives a number that is not finite.
        """
        vectors = np.empty((len(texts), self.settings.dimensions), np.float32)
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = texts[start : start + _TEXTS_AT_ONCE]
            ids = self.tokenizer.token_ids(part, kind)
            for rows in batches_of_like_length([len(row) for row in ids], TOKENS_PER_CALL):
                batch, mask = padded([ids[row] for row in rows], self.settings.pad_id)
                vectors[start + np.array(rows)] = self._model(batch, mask)
        if not np.isfinite(vectors).all():
            place = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise BundleError(f"encoder: the vector of text {texts[place][:80]!r} is not finite, with {self.provider}.")
        return vectors


def batches_of_like_length(lengths: Sequence[int], tokens_per_call: int) -> Iterator[list[int]]:
    """Places of texts in batches, the shortest first; a batch has at most so many tokens with padding, or one text.

    >>> list(batches_of_like_length([3, 1, 9, 2], tokens_per_call=6))
    [[1, 3], [0], [2]]
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        if batch and lengths[place] * (len(batch) + 1) > tokens_per_call:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def padded(token_ids: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask of a batch, shape (texts, longest), int64; padding is on the right."""
    longest = max(len(row) for row in token_ids)
    mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in token_ids], np.int64)
    batch = np.full(mask.shape, pad_id, np.int64)
    batch[mask == 1] = [id_ for row in token_ids for id_ in row]
    return batch, mask


def load_encoder(
    folder: str | Path, device: str = "cpu", *, threads: int | None = None, digest: str | None = None
) -> Encoder:
    """Open an encoder on a device, after it gave its golden vectors there.

    Args:
        folder: a path, or the URI of a folder, which is fetched once and kept (see csrm.artefacts.cache).
        device: cpu, cuda, or cuda:<number>.
        threads: threads of one forward pass on the CPU; None for one per core.
        digest: what the encoder's digest must be, or begin with; None: any.

    Raises:
        BundleError: a file is missing or changed, it is not the encoder that the digest names, it is for another
            version of CSRM, or a golden text has another vector here.
        DeviceError: the device is not there, or the runtime would use another one.
    """
    return open_encoder(*read_encoder(folder, digest), device, threads=threads)


def open_encoder(
    settings: EncoderSettings, digest: str, path: Path, device: str = "cpu", *, threads: int | None = None
) -> Encoder:
    """Open an encoder whose files were read by read_encoder; else as load_encoder."""
    from csrm.scoring.runtime import open_session  # onnxruntime is needed to embed, not to read settings

    where = f"encoder {str(path)!r}"
    session, provider = open_session(path / MODEL_NAME, device, threads)
    try:
        tokenizer = Tokenizer.from_file(str(path / TOKENIZER_NAME))
    except Exception as error:  # tokenizers raises Exception itself
        raise BundleError(f"{where}: {TOKENIZER_NAME}: {error}. Export it again.") from error
    model = graph_model(session)
    encoder = Encoder(TextTokenizer(tokenizer, settings), settings, model, digest=digest, provider=provider)
    golden = GoldenTexts.read(path / GOLDEN_NAME)
    require_same(path, ENCODER_KIND, digest)
    try:
        check_golden_texts(golden, encoder)
    except BundleError as error:
        raise BundleError(f"{where} on device {device!r}: {error}") from error
    return encoder


def graph_model(session: Any) -> TextModel:
    """What an encoder's graph computes, in a session of ONNX Runtime."""

    def model(token_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        (vectors,) = session.run(["embedding"], {"input_ids": token_ids, "attention_mask": mask})
        return np.asarray(vectors)

    return model


def read_encoder(folder: str | Path, digest: str | None = None) -> tuple[EncoderSettings, str, Path]:
    """Settings, digest and local folder of an encoder whose files are as they were exported.

    Args:
        folder: see load_encoder.
        digest: see load_encoder.

    Raises:
        BundleError: see load_encoder.
    """
    path = fetch_folder(folder, ENCODER_KIND)
    manifest = load_manifest(path, ENCODER_KIND, digest)
    if (found := manifest.about.get("format_version")) != FORMAT_VERSION:
        raise BundleError(
            f"encoder {str(path)!r}: format_version is {found!r}, this CSRM reads {FORMAT_VERSION}. "
            "Export the model again, or use the CSRM that exported it."
        )
    try:
        return EncoderSettings.model_validate(manifest.about), manifest.digest, path
    except ValidationError as error:
        raise BundleError(f"encoder {str(path)!r}: does not describe an encoder: {error}") from error


def encoder_digest(folder: str | Path) -> str:
    """The digest of an encoder by its manifest alone; read_encoder also checks that the other files are those of it.

    Raises:
        BundleError: no encoder there.
    """
    return read_manifest(fetch_folder(folder, ENCODER_KIND), ENCODER_KIND).digest


def check_golden_texts(golden: GoldenTexts, encoder: Encoder) -> float:
    """Embed golden texts as any other texts are embedded.

    Returns:
        The smallest cosine of a vector and its golden one.

    Raises:
        BundleError: a text has other tokens, or a vector points elsewhere; the message shows the worst text.
    """
    vectors = np.empty_like(golden.vectors)
    for kind in ("query", "passage"):
        rows = [place for place, of_text in enumerate(golden.kinds) if of_text == kind]
        texts = [golden.texts[row] for row in rows]
        for row, got in zip(rows, encoder.tokenizer.token_ids(texts, kind), strict=True):
            if got != golden.token_ids[row]:
                raise BundleError(
                    f"golden text {golden.texts[row]!r}: expected {len(golden.token_ids[row])} tokens "
                    f"{golden.token_ids[row][:8]}, got {len(got)}, {got[:8]}. The tokenizer is another model's."
                )
        if rows:
            vectors[rows] = encoder.embed(texts, kind)
    cosines = cosine(vectors, golden.vectors)
    worst = int(cosines.argmin())
    if not cosines[worst] >= encoder.settings.golden_cosine:
        raise BundleError(
            f"golden text {golden.texts[worst]!r}: its vector has cosine {cosines[worst]:.6f} with that of "
            f"{golden.source}, expected at least {encoder.settings.golden_cosine}. What runs here ({encoder.provider}) "
            "does not compute what was exported. Export it for this device, or embed where it was proven."
        )
    return float(cosines[worst])
