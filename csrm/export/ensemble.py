"""Several bundles as one: a graph that holds all of them, and answers with the weighted mean of their probabilities.

The result is a bundle like any other: one folder, one score a pair, one night. Its members read the same prompts.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pandas as pd
from onnx import compose, helper
from pydantic import Field, model_validator
from scipy.special import log_softmax, logsumexp

from csrm.artefacts.cache import is_far
from csrm.artefacts.manifest import MODEL_NAME, TOKENIZER_NAME, check_replaceable, replace_folder, unfinished_folder
from csrm.bundle.contents import BUNDLE_KIND, Origin, Parity
from csrm.bundle.golden import GoldenPairs, choose_golden_pairs
from csrm.bundle.loading import Bundle, default_tokens_per_call, load_bundle, load_scorer
from csrm.config import Settings
from csrm.errors import BundleError, ConfigError
from csrm.export.graph_files import TORCH_TYPES, GraphReader, GraphWriter, check_locations
from csrm.export.parity import SCORE_TOLERANCE, compare_logits
from csrm.export.quality import query_ndcgs
from csrm.export.trials import grade_gains, logged_step, wanted_precisions, write_best_precision
from csrm.export.vote import VoteSettings, add_vote, open_vote
from csrm.scoring.labels import expected_gain
from csrm.scoring.runtime import cpu_features, load_pack_scorer, require_device, require_one_onnxruntime
from csrm.scoring.scorer import PackScorer, PairScorer
from csrm.scoring.tokenization import SEEN_TOKENS_NAME

logger = logging.getLogger(__name__)
_SAME = ("labels", "grade_costs", "budgets", "template", "template_version")
"""What all members of an ensemble have alike, beside their tokenizer."""
_LEAST_BYTES = 1_024
"""Larger weights may lie beside the graph."""


class Ensemble(Settings):
    """Bundles that score together."""

    bundles: tuple[str, ...] = Field(min_length=1)
    """Folders of fp32 bundles with the same tokenizer, labels, budgets and template: of one base model, trained with
    other seeds, recipes or labels."""
    weights: tuple[float, ...] | None = None
    """Weight of each bundle's probabilities, above 0; their sum does not matter. None: chosen on quality_split of two
    bundles, where another share than the half gains more than its standard error over queries; else equal."""

    @model_validator(mode="after")
    def _has_a_weight_each(self) -> "Ensemble":
        if self.weights is not None and len(self.weights) != len(self.bundles):
            raise ValueError(f"weights: expected {len(self.bundles)}, one a bundle, got {len(self.weights)}")
        if self.weights is not None and not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(f"weights: expected numbers above 0, got {list(self.weights)}; leave such a bundle out")
        return self


def export_ensemble(
    ensemble: Ensemble,
    bundle_dir: Path,
    *,
    pairs: pd.DataFrame,
    judged: pd.DataFrame | None,
    precision: str,
    device: str,
    grade_labels: Mapping[str, str] | None,
    vote: VoteSettings | None = None,
) -> Bundle:
    """Write the bundle of an ensemble, after proof that it scores as its members' weighted mean.

    Args:
        ensemble: its bundles.
        bundle_dir: where it goes.
        pairs: see csrm.export.bundle.export_bundle; so are the others.
        judged: pairs that also choose the weights.
        precision: of the whole.
        device: that will score.
        grade_labels: grade to label.
        vote: what votes beside the bundles; None: nothing.

    Raises:
        BundleError: a member is not whole, is not fp32, or reads other prompts than the first.
        ConfigError: the ensemble would replace a member, or there is a vote and no judged pair.
        ParityError: the graph scores otherwise than its members, or the precision does not pass its gate.
    """
    check_replaceable(bundle_dir, BUNDLE_KIND)
    _require_apart(ensemble, bundle_dir)
    require_device(device)
    precisions = wanted_precisions(precision, device, judged is not None and len(judged) > 0)
    beside = open_vote(vote, device, judged)
    members = [load_bundle(folder) for folder in ensemble.bundles]
    _require_alike(members)
    scorers = [load_scorer(member.folder, device) for member in members]
    shares = _shares(ensemble, scorers, judged, grade_labels)
    with unfinished_folder(bundle_dir) as unfinished:
        folder, graph_path = unfinished / "bundle", unfinished / "fp32" / MODEL_NAME
        folder.mkdir()
        graph_path.parent.mkdir()
        (folder / TOKENIZER_NAME).write_bytes((members[0].folder / TOKENIZER_NAME).read_bytes())
        if (seen := seen_by_all(members)) is not None:
            (folder / SEEN_TOKENS_NAME).write_bytes(np.packbits(seen).tobytes())
        graph = _joined(members, scorers, shares, pairs, path=graph_path, device=device)
        runtime = require_one_onnxruntime()
        settings = members[0].settings.model_copy(
            update={
                "device": device,
                "pack_tolerance": 0.0,
                "golden_tolerance": 0.0,
                "golden_source": graph.golden.source,
                "origin": _origin(members, shares),
                "parity": graph.parity,
                "precisions": (),
                "cpu_features": cpu_features(),
                "versions": {package: version(package) for package in ("csrm", "onnx", "tokenizers", runtime)},
            }
        )
        write_best_precision(
            graph_path,
            graph.pack_scorer,
            precisions,
            precision == "auto",
            pairs,
            judged,
            grade_labels,
            graph.golden,
            settings,
            folder,
        )
        if beside is not None and judged is not None:
            with logged_step("the vote"):
                add_vote(folder, beside, graph.whole, pairs=pairs, judged=judged, grade_labels=grade_labels)
        replace_folder(folder, bundle_dir, BUNDLE_KIND)
    return load_bundle(bundle_dir)


class _Joined(NamedTuple):
    """The graph of an ensemble, with what proves it."""

    pack_scorer: PackScorer
    whole: PairScorer
    """With the graph."""
    parity: Parity
    golden: GoldenPairs


def _joined(
    members: Sequence[Bundle],
    scorers: Sequence[PairScorer],
    shares: Sequence[float],
    pairs: pd.DataFrame,
    *,
    path: Path,
    device: str,
) -> _Joined:
    """Write the graph of an ensemble, after proof that it scores as its members' weighted mean.

    Raises:
        ParityError: it does not.
    """
    first = scorers[0]
    with logged_step(f"one graph of {len(members)}"):
        join_graphs([member.folder / MODEL_NAME for member in members], shares, path)
        check_locations(path)
    with logged_step(f"scores of {len(pairs)} pairs in the members and in the graph on {device}"):
        expected = mean_logits([scorer.logits(pairs) for scorer in scorers], shares)
        pack_scorer, provider = load_pack_scorer(path, device)
        tokens_per_call = default_tokens_per_call(device)
        whole = PairScorer(first.tokenizer, first.labels, pack_scorer=pack_scorer, tokens_per_call=tokens_per_call)
        names = ("the members", provider)
        parity = compare_logits(pairs, expected, whole.logits(pairs), first.labels, names, SCORE_TOLERANCE)
    scores = expected_gain(expected, np.array([label.gain for label in first.labels]))
    alone = members[0].settings.golden_source if len(members) == 1 else f"the mean of {len(members)} bundles"
    golden = choose_golden_pairs(pairs, scores, whole.tokenizer, f"{alone}, {provider}")
    golden.require_different(SCORE_TOLERANCE)
    return _Joined(pack_scorer, whole, parity, golden)


def seen_by_all(members: Sequence[Bundle]) -> np.ndarray | None:
    """Whether all members' trainings saw each token id, bool; None where nobody knows that of one of them."""
    known = [seen for member in members if (seen := member.seen_tokens()) is not None]
    if len(known) < len(members):
        return None
    num_ids = min(map(len, known))
    return np.logical_and.reduce([seen[:num_ids] for seen in known])


def mean_logits(logits: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """Logits of the weighted mean of label probabilities, shape (num_pairs, num_labels).

    Args:
        logits: of each member, shape (num_pairs, num_labels).
        shares: of the members, sum 1.

    >>> both = mean_logits([np.log([[0.8, 0.2]]), np.log([[0.4, 0.6]])], [0.75, 0.25])
    >>> np.exp(both).round(2)
    array([[0.7, 0.3]])
    """
    weighted = [log_softmax(of, axis=1) + math.log(share) for of, share in zip(logits, shares, strict=True)]
    mean: np.ndarray = logsumexp(weighted, axis=0)
    return mean


def join_graphs(paths: Sequence[Path], shares: Sequence[float], path: Path) -> None:
    """Write one graph whose logits are `mean_logits` of those of several graphs with the same inputs.

    Args:
        paths: of graphs with the output `logits`.
        shares: of the graphs, sum 1.
        path: of the new graph; see GraphWriter.
    """
    nodes, initializers, weighted = [], [], []
    opsets: dict[str, int] = {}
    with GraphWriter(path) as writer:
        for number, (source, share) in enumerate(zip(paths, shares, strict=True)):
            reader = GraphReader(source)
            prefix = f"member{number}."
            part = compose.add_prefix(reader.model, prefix, rename_inputs=False)
            for tensor, own in zip(part.graph.initializer, reader.model.graph.initializer, strict=True):
                is_large = own.ByteSize() > _LEAST_BYTES or own.data_location == onnx.TensorProto.EXTERNAL
                takes = is_large and own.data_type in TORCH_TYPES
                initializers.append(writer.add(tensor.name, reader.weight(own.name)) if takes else tensor)
            nodes.extend(part.graph.node)
            opsets |= {opset.domain: max(opset.version, opsets.get(opset.domain, 0)) for opset in part.opset_import}
            log_share = helper.make_tensor(f"{prefix}log_share", onnx.TensorProto.FLOAT, [], [math.log(share)])
            initializers.append(log_share)
            nodes.append(helper.make_node("LogSoftmax", [f"{prefix}logits"], [f"{prefix}log_softmax"], axis=-1))
            nodes.append(helper.make_node("Add", [f"{prefix}log_softmax", log_share.name], [f"{prefix}weighted"]))
            weighted.append(f"{prefix}weighted")
        nodes.append(helper.make_node("Max", weighted, ["largest"]))
        for name in weighted:  # the largest is taken off first, so that no sum is 0
            nodes.append(helper.make_node("Sub", [name, "largest"], [f"{name}.less"]))
            nodes.append(helper.make_node("Exp", [f"{name}.less"], [f"{name}.exp"]))
        nodes.append(helper.make_node("Sum", [f"{name}.exp" for name in weighted], ["sum"]))
        nodes.append(helper.make_node("Log", ["sum"], ["log_sum"]))
        nodes.append(helper.make_node("Add", ["largest", "log_sum"], ["logits"]))
        first = GraphReader(paths[0]).model
        graph = helper.make_graph(nodes, "ensemble", first.graph.input, first.graph.output, initializers)
        imports = [helper.make_opsetid(domain, number) for domain, number in opsets.items()]
        writer.save(helper.make_model(graph, opset_imports=imports, ir_version=first.ir_version))


def _require_apart(ensemble: Ensemble, bundle_dir: Path) -> None:
    """Refuse a folder that is a member's: the next export would join the ensemble again, as if it were that member."""
    if bundle_dir.resolve() in [Path(folder).resolve() for folder in ensemble.bundles if not is_far(folder)]:
        raise ConfigError(
            f"bundle_dir {str(bundle_dir)!r}: expected a folder of its own, got that of a bundle of the ensemble, "
            "which would be replaced. Name another folder."
        )


def _require_alike(members: Sequence[Bundle]) -> None:
    """Refuse members that one graph cannot serve."""
    first = members[0]
    prompts = (first.folder / TOKENIZER_NAME).read_bytes()
    if len({member.digest for member in members}) < len(members):
        raise BundleError(
            f"ensemble: two of {[str(member.folder) for member in members]} are the same bundle. Name each once, and "
            "give it the larger weight."
        )
    for member in members:
        if member.settings.vote is not None:
            raise BundleError(
                f"ensemble: bundle {str(member.folder)!r} has a vote already. Export it without one, and give the "
                "section vote where the bundles are joined."
            )
        if member.settings.precision != "fp32":
            raise BundleError(
                f"ensemble: bundle {str(member.folder)!r} is {member.settings.precision}, expected fp32. Export it at "
                "precision fp32; the precision of the ensemble is chosen for the whole."
            )
        different = [name for name in _SAME if getattr(member.settings, name) != getattr(first.settings, name)]
        if (member.folder / TOKENIZER_NAME).read_bytes() != prompts:
            different.append("tokenizer")
        if different:
            raise BundleError(
                f"ensemble: bundle {str(member.folder)!r} has another {' and '.join(different)} than "
                f"{str(first.folder)!r}. One graph reads one prompt: train both on models of one family, with the same "
                "labels, budgets and template. Else publish two score tables and mix them where they are read."
            )


def _shares(
    ensemble: Ensemble,
    scorers: Sequence[PairScorer],
    judged: pd.DataFrame | None,
    grade_labels: Mapping[str, str] | None,
) -> list[float]:
    """Shares of the members, sum 1: as given, chosen on judged pairs, or equal."""
    if ensemble.weights is not None:
        return [weight / sum(ensemble.weights) for weight in ensemble.weights]
    equal = [1 / len(scorers)] * len(scorers)
    if len(scorers) != 2 or judged is None or judged.empty:
        return equal
    scores = [scorer.score(judged)["relevance_score"].to_numpy(np.float64) for scorer in scorers]
    queries = (judged["market"] + "\t" + judged["query_id"]).to_numpy()
    share = best_share(scores[0], scores[1], grade_gains(judged, scorers[0].labels, grade_labels), queries)
    logger.info("weights: %.1f and %.1f, by nDCG@10 of %d queries", share, 1 - share, len(set(queries)))
    return [share, 1 - share]


def best_share(first: np.ndarray, second: np.ndarray, gains: np.ndarray, queries: np.ndarray) -> float:
    """Share of the first scores in a mean of both, of 0.1 to 0.9, by nDCG@10.

    Another share than the half is taken only where it gains more than the standard error of its gain over queries: few
    queries order shares by chance.

    Args:
        first: scores of one ranking, shape (num_pairs,).
        second: scores of the other, on the same scale.
        gains: of each pair's grade.
        queries: of each pair.
    """
    _, query_of_pair = np.unique(queries, return_inverse=True)

    def ndcgs(share: float) -> np.ndarray:
        found = query_ndcgs(query_of_pair, gains, share * first + (1 - share) * second)
        return found[np.isfinite(found)]

    half = ndcgs(0.5)
    best, most = 0.5, 0.0
    for tenths in (4, 6, 3, 7, 2, 8, 1, 9):
        gain = ndcgs(tenths / 10) - half
        if len(gain) > 1 and gain.mean() > max(most, gain.std(ddof=1) / math.sqrt(len(gain))):
            best, most = tenths / 10, float(gain.mean())
    return best


def _origin(members: Sequence[Bundle], shares: Sequence[float]) -> Origin:
    """Where the weights of all members come from."""
    if len(members) == 1:
        return members[0].settings.origin
    return Origin(
        base_model=" and ".join(dict.fromkeys(member.settings.origin.base_model for member in members)),
        base_model_files={
            f"{member.digest[:12]}/{name}": digest
            for member in members
            for name, digest in member.settings.origin.base_model_files.items()
        },
        ensemble={member.digest: round(share, 6) for member, share in zip(members, shares, strict=True)},
    )
