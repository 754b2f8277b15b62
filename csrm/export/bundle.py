"""Export a trained model to a bundle, after proof that both give the same scores."""

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from csrm.artefacts.manifest import MODEL_NAME, TOKENIZER_NAME, check_replaceable, replace_folder, unfinished_folder
from csrm.bundle.contents import BUNDLE_KIND, BundleSettings, Parity, TensorSpec
from csrm.bundle.golden import GoldenPairs, choose_golden_pairs
from csrm.bundle.loading import Bundle, default_tokens_per_call, load_bundle
from csrm.export.graph_files import check_locations
from csrm.export.packed_onnx import export_packed_graph
from csrm.export.parity import SCORE_TOLERANCE, check_parity, compare_logits
from csrm.export.source import ExportSource, Reranker, open_source
from csrm.export.streamed import StreamedModel
from csrm.export.trials import logged_step, wanted_precisions, write_best_precision
from csrm.export.vote import VoteSettings, add_vote, open_vote
from csrm.export.weights import ModelWeights
from csrm.scoring.labels import GradeCosts, Label, cost_matrix, expected_gain
from csrm.scoring.runtime import cpu_features, graph_tensors, load_pack_scorer, require_device, require_one_onnxruntime
from csrm.scoring.scorer import PairScorer
from csrm.scoring.tokenization import SEEN_TOKENS_NAME, PromptTokenizer
from csrm.training.model.relevance import torch_pack_scorer

_MERGE_PAIRS = 32
_TORCH_TOKENS = 4_096
"""Tokens of a call in torch: activations of so many take 1 GB in a model of 8 billion weights."""
logger = logging.getLogger(__name__)


def export_bundle(
    model: str | Path | Reranker,
    bundle_dir: Path,
    pairs: pd.DataFrame,
    judged: pd.DataFrame | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    grade_labels: Mapping[str, str] | None = None,
    *,
    grade_costs: GradeCosts | None = None,
    vote: VoteSettings | None = None,
) -> Bundle:
    """Write the bundle of a trained folder, or of a reranker as it is.

    Args:
        model: the folder, or the reranker.
        pairs: real pairs (csrm.scoring.PAIR_COLUMNS) over which the scores of torch and the graph must agree.
        judged: pairs of whole queries with market, query_id and grade, which no precision may rank worse than fp32.
        precision: fp32, fp16, bf16, int8, int4, or auto.
        device: that will score.
        grade_labels: see ExportConfig.
        grade_costs: see ExportConfig; other ones make another bundle, with another digest.
        vote: what votes beside the model; None: nothing.

    Raises:
        ParityError: scores do not agree, or the precision does not pass its gate; nothing was written.
        BundleError: the model is incomplete or was changed, or gives all pairs one score; nothing was written.
        ConfigError: the model is not supported, the precision cannot be proven, grade_costs do not fit its labels, or
            another process exports there; said before any work.
        DeviceError: the device is not there.
    """
    check_replaceable(bundle_dir, BUNDLE_KIND)
    require_device(device)
    has_labels = judged is not None and len(judged) > 0
    precisions = wanted_precisions(precision, device, has_labels)
    beside = open_vote(vote, device, judged)
    source = open_source(model)
    tokenizer, labels = source.prompt_tokenizer(), source.labels
    if grade_costs is not None:
        cost_matrix(labels, grade_costs)
    with unfinished_folder(bundle_dir) as unfinished:
        folder = unfinished / "bundle"
        folder.mkdir()
        (folder / TOKENIZER_NAME).write_text(source.tokenizer_json, encoding="utf-8")
        if source.seen_tokens is not None:
            (folder / SEEN_TOKENS_NAME).write_bytes(source.seen_tokens)
        in_torch_model = source.weights.merged_model(tokenizer.label_ids(labels))
        in_torch = torch_scorer(in_torch_model, tokenizer, labels, "torch")
        if source.weights.has_adapters:
            with logged_step("adapters in the weights, against adapters beside them"):
                check_merge(source.weights, tokenizer, in_torch, pairs.iloc[:_MERGE_PAIRS])
        with logged_step(f"scores of {len(pairs)} pairs in torch"):
            torch_logits = in_torch.logits(pairs)
        scores = expected_gain(torch_logits, np.array([label.gain for label in labels]))
        golden = choose_golden_pairs(pairs, scores, tokenizer, f"torch {torch.__version__}")
        golden.require_different(SCORE_TOLERANCE)
        with logged_step("fp32 graph"):
            graph_path = unfinished / "fp32" / MODEL_NAME
            graph_path.parent.mkdir()
            export_packed_graph(in_torch_model, graph_path)
            check_locations(graph_path)
        with logged_step(f"scores of {len(pairs)} pairs in the graph on {device}"):
            pack_scorer, provider = load_pack_scorer(graph_path, device)
            onnx_scorer = PairScorer(
                tokenizer,
                labels,
                pack_scorer=pack_scorer,
                tokens_per_call=default_tokens_per_call(device),
                provider=provider,
            )
            parity = compare_logits(
                pairs, torch_logits, onnx_scorer.logits(pairs), labels, ("torch", provider), SCORE_TOLERANCE
            )
        settings = _settings(source, parity, golden, graph_path, device)
        if grade_costs is not None:
            own_costs = {label: dict(row) for label, row in grade_costs.items()}
            settings = settings.model_copy(update={"grade_costs": own_costs})
        write_best_precision(
            graph_path,
            pack_scorer,
            precisions,
            precision == "auto",
            pairs,
            judged,
            grade_labels,
            golden,
            settings,
            folder,
        )
        if beside is not None and judged is not None:
            with logged_step("the vote"):
                add_vote(folder, beside, onnx_scorer, pairs=pairs, judged=judged, grade_labels=grade_labels)
        replace_folder(folder, bundle_dir, BUNDLE_KIND)
    return load_bundle(bundle_dir)


def check_merge(weights: ModelWeights, tokenizer: PromptTokenizer, merged: PairScorer, pairs: pd.DataFrame) -> None:
    """Adapters inside of the weights must score as adapters beside them.

    Args:
        weights: with adapters.
        tokenizer: of the model.
        merged: scorer of the model as it is exported.
        pairs: see csrm.scoring.PAIR_COLUMNS.

    Raises:
        ParityError: they do not.
    """
    adapted = weights.adapted_model(tokenizer.label_ids(merged.labels))
    check_parity(pairs, torch_scorer(adapted, tokenizer, merged.labels, "adapters"), merged, SCORE_TOLERANCE)


def torch_scorer(
    model: StreamedModel, tokenizer: PromptTokenizer, labels: Sequence[Label], provider: str
) -> PairScorer:
    """Scorer with a streamed model; long calls, because each one reads all weights."""
    tokens_per_call = max(_TORCH_TOKENS, tokenizer.budgets.prompt)
    return PairScorer(
        tokenizer,
        labels,
        pack_scorer=torch_pack_scorer(model),
        tokens_per_call=tokens_per_call,
        provider=provider,
    )


def _settings(
    source: ExportSource, parity: Parity, golden: GoldenPairs, graph_path: Path, device: str
) -> BundleSettings:
    inputs, outputs = graph_tensors(graph_path)
    packages = ["csrm", "torch", "transformers", "peft", "optimum", "optimum-onnx", "onnx", "onnx-ir", "tokenizers"]
    return BundleSettings(
        template=source.template,
        labels=source.labels,
        budgets=source.budgets,
        precision="fp32",
        device=device,
        pack_tolerance=0.0,
        golden_tolerance=0.0,
        golden_source=golden.source,
        origin=source.origin,
        inputs={name: TensorSpec(type=type_, shape=shape) for name, (type_, shape) in inputs.items()},
        outputs={name: TensorSpec(type=type_, shape=shape) for name, (type_, shape) in outputs.items()},
        parity=parity,
        precisions=(),
        cpu_features=cpu_features(),
        versions={package: version(package) for package in [*packages, require_one_onnxruntime()]},
    )
