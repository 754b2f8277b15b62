"""Export a text encoder in the layout of sentence-transformers, after proof that both give the same vectors."""

import json
import logging
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from optimum.exporters.onnx import export
from optimum.exporters.onnx.base import OnnxConfig
from optimum.utils import DummyInputGenerator, NormalizedTextConfig
from pydantic import Field, model_validator
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from csrm.artefacts.manifest import (
    GOLDEN_NAME,
    MODEL_NAME,
    TOKENIZER_NAME,
    check_replaceable,
    file_digest,
    replace_folder,
    unfinished_folder,
    write_manifest,
)
from csrm.config import InputSpec, Settings
from csrm.embedding.contents import ENCODER_KIND, EncoderSettings, GoldenTexts, Pooling, Recall, TextKind
from csrm.embedding.encoder import Encoder, TextModel, TextTokenizer, graph_model, load_encoder
from csrm.errors import ConfigError, ParityError
from csrm.export.encoder_precision import JudgedTexts, recall, write_gated
from csrm.export.graph_files import check_locations
from csrm.export.trials import logged_step
from csrm.scoring.runtime import open_session, require_device, require_one_onnxruntime
from csrm.scoring.vote import cosine
from csrm.training.model.families import check_weights
from csrm.training.model.quiet import quiet_libraries

FAMILIES = ("bert", "xlm-roberta", "qwen3", "gemma3_text")
"""`model_type` of the encoders whose graph is proven by tests."""
MIN_COSINE = 0.9999
"""Smallest cosine of the graph's vector of a text and torch's."""
MIN_COSINE_OF_PRECISION = 0.999
"""The same of a golden text where the precision is another one: processors round 8 and 16 bits in their own ways."""
NUM_GOLDEN = 16
OPSET = 18
_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_POOLING_MODES: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
logger = logging.getLogger(__name__)


class EncoderInputs(Settings):
    """Real texts for the proof."""

    catalog: InputSpec
    queries: InputSpec
    judgments: InputSpec | None = None
    """Judged pairs, on which another precision than fp32 has to prove itself."""


class EncoderExportConfig(Settings):
    """Settings of the export. What is null is taken from the folder's own files."""

    model_dir: str
    """Folder in the layout of sentence-transformers, or of save_pretrained (safetensors)."""
    encoder_dir: str
    """Where the encoder goes; replaced, in one piece, when the proof holds."""
    inputs: EncoderInputs
    pooling: Pooling | None = None
    """How the vectors of a text's tokens become one: mean, cls or last."""
    normalize: bool | None = None
    """Whether vectors get length 1."""
    dimensions: int | None = Field(default=None, ge=1)
    """The first so many numbers of a vector are kept; for models that were trained for it (Matryoshka)."""
    query_prefix: str | None = None
    """Text before each query, such as "query: "."""
    passage_prefix: str | None = None
    """Text before each product title, such as "passage: "."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of a text."""
    device: str = "cpu"
    """Device that will embed: cpu, cuda or cuda:<number>."""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """Precision of the graph. fp16 is for GPUs, int8 (weights, and activations where it loses little) for CPUs."""
    relevant_grades: tuple[str, ...] = ("E",)
    """Grades of judged pairs that count as relevant."""
    max_recall_loss: float = Field(default=0.01, ge=0, le=1)
    """Most recall@10 that a precision may lose on the judged pairs."""
    judged_queries: int = Field(default=500, ge=1)
    """Judged queries that recall is measured with."""
    judged_titles: int = Field(default=5000, ge=10)
    """Titles that are searched: those of the judged pairs, and others of the catalog up to so many."""
    parity_texts: int = Field(default=256, ge=1)
    """Texts of each table whose vectors are compared with torch's."""

    @model_validator(mode="after")
    def _precision_has_judged_pairs(self) -> Self:
        if self.precision != "fp32" and self.inputs.judgments is None:
            raise ValueError(f"precision {self.precision}: expected inputs.judgments, on which it has to prove itself")
        return self


class _Pooled(torch.nn.Module):
    """A model with its pooling: token ids and attention mask to one vector a text."""

    def __init__(self, model: PreTrainedModel, dense: Sequence[torch.nn.Linear], settings: EncoderSettings) -> None:
        super().__init__()
        self.model, self.dense = model, torch.nn.Sequential(*dense)
        self.pooling, self.normalize, self.dimensions = settings.pooling, settings.normalize, settings.dimensions
        self.config = model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            vectors = tokens[:, 0]
        elif self.pooling == "mean":
            weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
            vectors = (tokens * weights).sum(1) / weights.sum(1)
        else:
            last = (attention_mask.sum(1) - 1).reshape(-1, 1, 1).expand(-1, 1, tokens.shape[-1])
            vectors = tokens.gather(1, last).squeeze(1)
        vectors = self.dense(vectors)[:, : self.dimensions]
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return {"embedding": vectors}


class _ExampleTexts(DummyInputGenerator):
    SUPPORTED_INPUT_NAMES = ("input_ids", "attention_mask")

    def __init__(self, task: str, normalized_config: Any, **kwargs: Any) -> None:
        self._inputs = {
            "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        }

    def generate(self, input_name: str, framework: str = "pt", **kwargs: Any) -> torch.Tensor | np.ndarray:
        tensor = self._inputs[input_name]
        return tensor.numpy() if framework == "np" else tensor


class _EncoderOnnxConfig(OnnxConfig):
    """Inputs and outputs of an encoder's graph, for Optimum."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (_ExampleTexts,)
    DEFAULT_ONNX_OPSET = OPSET

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        return {name: {0: "texts", 1: "tokens"} for name in _ExampleTexts.SUPPORTED_INPUT_NAMES}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        return {"embedding": {0: "texts"}}


def export_encoder(
    config: EncoderExportConfig, titles: Sequence[str], queries: Sequence[str], judged: JudgedTexts | None = None
) -> Encoder:
    """Write the encoder of a model folder.

    Args:
        config: settings of the export; its inputs are not read.
        titles: real product titles over which the vectors of torch and the graph must agree, at least one.
        queries: real queries, the same.
        judged: judged texts, for another precision than fp32.

    Returns:
        The encoder, as load_encoder opens it.

    Raises:
        ConfigError: the model is not supported, or a setting does not fit it; said before any work.
        ParityError: vectors do not agree, or the precision loses too much recall; nothing was written.
        DeviceError: the device is not there.
    """
    encoder_dir = Path(config.encoder_dir)
    check_replaceable(encoder_dir, ENCODER_KIND)
    require_device(config.device)
    settings = encoder_settings(config)
    with unfinished_folder(encoder_dir) as unfinished:
        with logged_step("model in torch"):
            model = AutoModel.from_pretrained(
                config.model_dir, local_files_only=True, dtype=torch.float32, attn_implementation="eager"
            ).eval()
            _tokenizer(config.model_dir).save(str(unfinished / TOKENIZER_NAME))
        pooled = _Pooled(model, _dense_layers(Path(config.model_dir)), settings).eval()
        tokenizer = TextTokenizer(Tokenizer.from_file(str(unfinished / TOKENIZER_NAME)), settings)
        in_torch = Encoder(tokenizer, settings, _torch_model(pooled), digest="", provider=f"torch {torch.__version__}")
        texts: list[tuple[TextKind, Sequence[str]]] = [("query", queries), ("passage", titles)]
        with logged_step(f"vectors of {len(queries) + len(titles)} texts in torch"):
            expected = np.concatenate([in_torch.embed(part, kind) for kind, part in texts])
        with logged_step("graph"), quiet_libraries():
            export(pooled, _EncoderOnnxConfig(model.config, task="feature-extraction"), unfinished / MODEL_NAME)
            check_locations(unfinished / MODEL_NAME)
        with logged_step(f"vectors in the graph on {config.device}"):
            session, provider = open_session(unfinished / MODEL_NAME, config.device)
            in_graph = Encoder(tokenizer, settings, graph_model(session), digest="", provider=provider)
            got = np.concatenate([in_graph.embed(part, kind) for kind, part in texts])
        smallest = _check_cosines([*queries, *titles], expected, got, provider)
        golden = _golden(texts, expected, tokenizer, in_torch.provider)
        found: dict[str, Any] = {"smallest_cosine": smallest}
        if config.precision != "fp32":
            assert judged is not None
            measured = _write_precision(config, unfinished, in_torch, judged)
            session, provider = open_session(unfinished / MODEL_NAME, config.device)
            in_graph = Encoder(tokenizer, settings, graph_model(session), digest="", provider=provider)
            got = np.concatenate([in_graph.embed(part, kind) for kind, part in texts])
            golden = _golden(texts, got, tokenizer, f"{provider} at {config.precision}")
            smallest = float(cosine(got, expected).min())
            found = {"smallest_cosine": smallest, "golden_cosine": MIN_COSINE_OF_PRECISION}
            found |= {"precision": config.precision, "recall": measured}
        golden.write(unfinished / GOLDEN_NAME)
        about = settings.model_copy(update=found).model_dump(mode="json")
        write_manifest(unfinished, ENCODER_KIND, about)
        replace_folder(unfinished, encoder_dir, ENCODER_KIND)
    return load_encoder(encoder_dir, config.device)


def _write_precision(config: EncoderExportConfig, folder: Path, in_torch: Encoder, judged: JudgedTexts) -> Recall:
    """Replace the folder's graph by one of the precision, once it has proven itself."""

    def recall_of(encoder: Encoder) -> float:
        queries = encoder.embed([text for _, text in judged.queries], "query")
        titles = encoder.embed([text for _, text in judged.titles])
        return recall(queries, titles, judged)

    def measure(path: Path) -> float:
        session, provider = open_session(path, config.device)
        model = graph_model(session)
        return recall_of(Encoder(in_torch.tokenizer, in_torch.settings, model, digest="", provider=provider))

    fp32 = folder / "fp32"
    fp32.mkdir()
    for file in [*folder.glob(f"{MODEL_NAME}*")]:
        file.rename(fp32 / file.name)
    with logged_step(f"graph at {config.precision}, recall on {len(judged.queries)} judged queries"):
        measured = write_gated(
            fp32 / MODEL_NAME,
            config.precision,
            fp32 / "written" / MODEL_NAME,
            measure=measure,
            recall_of_torch=recall_of(in_torch),
            max_loss=config.max_recall_loss,
            num_queries=len(judged.queries),
            device=config.device,
        )
    for file in (fp32 / "written").glob(f"{MODEL_NAME}*"):
        file.rename(folder / file.name)
    shutil.rmtree(fp32)
    return measured


def encoder_settings(config: EncoderExportConfig) -> EncoderSettings:
    """What the manifest will say: the export's settings, and where these are null, those of the model's folder.

    Raises:
        ConfigError: the folder or a setting is not supported; all problems in one message.
    """
    folder = Path(config.model_dir)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model_dir: {str(folder / 'config.json')!r} is not there. Is {str(folder)!r} a model's folder?"
        )
    check_weights(folder)
    try:
        model_config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ConfigError(f"model_dir {str(folder)!r}: its configuration cannot be read: {error}") from error
    problems = []
    if model_config.model_type not in FAMILIES:
        problems.append(f"models of type {model_config.model_type!r} are not supported, only {', '.join(FAMILIES)}")
    modules = [str(entry.get("type", "")).rpartition(".")[2] for entry in _json(folder / "modules.json", [])]
    if unknown := [name for name in modules if name not in _MODULES]:
        problems.append(f"modules.json has {', '.join(unknown)}; only {', '.join(_MODULES)} are supported")
    pooling = config.pooling or _pooling(folder, problems)
    dense = _dense_shapes(folder, int(model_config.hidden_size), problems)
    hidden_size = dense[-1] if dense else int(model_config.hidden_size)
    dimensions = config.dimensions or _json(folder / "config_sentence_transformers.json", {}).get("truncate_dim")
    if (dimensions or 1) > hidden_size:
        problems.append(f"dimensions is {dimensions}, but the model has {hidden_size}")
    room = int(model_config.max_position_embeddings) - (2 if model_config.model_type == "xlm-roberta" else 0)
    of_folder = _json(folder / "sentence_bert_config.json", {}).get("max_seq_length")
    max_tokens = config.max_tokens or min(of_folder or room, room)
    if max_tokens > room:
        problems.append(f"max_tokens is {max_tokens}, but the model was made for {room}")
    if problems:
        raise ConfigError(f"model_dir {str(folder)!r} cannot be exported as an encoder: {'; '.join(problems)}.")
    prompts = _json(folder / "config_sentence_transformers.json", {}).get("prompts") or {}
    of_passage = next((prompts[name] for name in ("passage", "document") if prompts.get(name)), "")
    packages = ["csrm", "torch", "transformers", "optimum", "optimum-onnx", "onnx", "tokenizers"]
    return EncoderSettings(
        model=folder.resolve().name,
        model_files={path.relative_to(folder).as_posix(): file_digest(path) for path in _weights(folder)},
        model_type=model_config.model_type,
        pooling=pooling,
        normalize="Normalize" in modules if config.normalize is None else config.normalize,
        dimensions=dimensions or hidden_size,
        query_prefix=prompts.get("query", "") if config.query_prefix is None else config.query_prefix,
        passage_prefix=of_passage if config.passage_prefix is None else config.passage_prefix,
        max_tokens=max_tokens,
        pad_id=int(getattr(model_config, "pad_token_id", None) or 0),
        golden_cosine=MIN_COSINE,
        smallest_cosine=0.0,
        versions={package: version(package) for package in [*packages, require_one_onnxruntime()]},
    )


def _pooling(folder: Path, problems: list[str]) -> Pooling:
    found = [
        (name, value)
        for path in sorted(folder.glob("*Pooling/config.json"))
        for name, value in _json(path, {}).items()
        if name.startswith("pooling_mode_") and value
    ]
    modes = [name for name, _ in found]
    if len(modes) == 1 and modes[0] in _POOLING_MODES:
        return _POOLING_MODES[modes[0]]
    said = f"its Pooling/config.json has {', '.join(modes)}" if modes else "no Pooling/config.json says how"
    problems.append(f"pooling: expected one of {', '.join(get_args(Pooling))}; {said}. Set 'pooling'")
    return "mean"


def _dense_folders(folder: Path) -> list[Path]:
    """Folders of the linear layers after the pooling, in their order."""
    return [
        folder / str(entry.get("path", ""))
        for entry in _json(folder / "modules.json", [])
        if str(entry.get("type", "")).rpartition(".")[2] == "Dense"
    ]


def _weights(folder: Path) -> list[Path]:
    """Files of the model's weights, and of those of its linear layers."""
    return [*sorted(folder.glob("*.safetensors")), *(path / "model.safetensors" for path in _dense_folders(folder))]


def _dense_shapes(folder: Path, hidden_size: int, problems: list[str]) -> list[int]:
    """Numbers that each linear layer gives."""
    sizes = [hidden_size]
    for path in _dense_folders(folder):
        values = _json(path / "config.json", {})
        if values.get("in_features") != sizes[-1] or not isinstance(values.get("out_features"), int):
            problems.append(f"{path.name}/config.json: expected in_features {sizes[-1]}, got {values}")
        if not str(values.get("activation_function", "")).endswith("Identity"):
            named = values.get("activation_function")
            problems.append(f"{path.name}: activation {named!r}; only Identity is supported")
        if not (path / "model.safetensors").is_file():
            problems.append(f"{path.name}: there is no model.safetensors; only that format is supported")
        sizes.append(values.get("out_features") or 0)
    return sizes[1:]


def _dense_layers(folder: Path) -> list[torch.nn.Linear]:
    """The linear layers after the pooling."""
    layers = []
    for path in _dense_folders(folder):
        weights = load_file(path / "model.safetensors")
        out_features, in_features = weights["linear.weight"].shape
        layer = torch.nn.Linear(in_features, out_features, bias="linear.bias" in weights)
        layer.load_state_dict({name.removeprefix("linear."): tensor.float() for name, tensor in weights.items()})
        layers.append(layer)
    return layers


def _json(path: Path, default: Any) -> Any:
    """What a file of the folder says, or the default where it is not there.

    Raises:
        ConfigError: it is not JSON of the same kind.
    """
    if not path.is_file():
        return default
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is not JSON: {error}. Copy the model again.") from error
    if not isinstance(values, type(default)):
        raise ConfigError(f"{str(path)!r}: expected a {type(default).__name__}, got {type(values).__name__}.")
    return values


def _tokenizer(model_dir: str) -> Tokenizer:
    path = Path(model_dir) / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
        model_dir, local_files_only=True, use_fast=True
    ).backend_tokenizer
    return tokenizer


def _torch_model(pooled: _Pooled) -> TextModel:
    def model(token_ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            vectors = pooled(torch.from_numpy(token_ids), torch.from_numpy(mask))["embedding"]
        return np.asarray(vectors.numpy())

    return model


def _check_cosines(texts: Sequence[str], expected: np.ndarray, got: np.ndarray, provider: str) -> float:
    cosines = cosine(got, expected)
    worst = int(cosines.argmin())
    if not cosines[worst] >= MIN_COSINE:
        raise ParityError(
            f"encoder: the vectors of {provider} and torch for text {texts[worst]!r} have cosine {cosines[worst]:.6f}, "
            f"expected at least {MIN_COSINE}. Nothing was written."
        )
    return float(cosines[worst])


def _golden(
    texts: Sequence[tuple[TextKind, Sequence[str]]], vectors: np.ndarray, tokenizer: TextTokenizer, source: str
) -> GoldenTexts:
    """A few of the texts with torch's vectors, of each kind alike."""
    kinds: list[TextKind] = []
    chosen, rows, start = [], [], 0
    for kind, part in texts:
        places = np.linspace(0, len(part) - 1, min(NUM_GOLDEN // 2, len(part))).round().astype(int)
        kinds += [kind] * len(places)
        chosen += [part[place] for place in places]
        rows += [start + int(place) for place in places]
        start += len(part)
    ids = [tokenizer.token_ids([text], kind)[0] for kind, text in zip(kinds, chosen, strict=True)]
    return GoldenTexts(source, kinds, chosen, ids, vectors[rows])
