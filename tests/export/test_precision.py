"""Smaller precisions: what they do to scores, and the gate that they must pass."""

import copy
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest

from csrm.bundle.card import bundle_card
from csrm.bundle.contents import Precision, Quality
from csrm.bundle.golden import choose_golden_pairs
from csrm.bundle.loading import Bundle, load_bundle, load_scorer
from csrm.errors import BundleError, ConfigError, InputError, ParityError
from csrm.evaluation.metrics import evaluate_scores
from csrm.export.bundle import export_bundle
from csrm.export.graph_files import check_locations
from csrm.export.half import fuse_norms
from csrm.export.packed_onnx import export_packed_graph
from csrm.export.parity import pack_spread
from csrm.export.precision import RECIPES, Recipe, write_precision
from csrm.export.quality import gate, measure_quality
from csrm.export.trials import wanted_precisions, whole_queries, write_best_precision
from csrm.scoring.labels import ESCI_LABELS
from csrm.scoring.packing import build_packs
from csrm.scoring.runtime import load_pack_scorer
from csrm.scoring.scorer import PackScorer, PairScorer, pair_groups
from csrm.scoring.tokenization import PromptTokenizer
from csrm.training.model.relevance import PackedRelevanceModel
from tests.export.loud_models import make_loud

GAINS = {label.name: label.gain for label in ESCI_LABELS}


@pytest.fixture(scope="module")
def fp32_graph(loud_model: PackedRelevanceModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    export_packed_graph(loud_model, path)
    return path


def scores_of(path: Path, tokenizer: PromptTokenizer, pairs: pd.DataFrame) -> np.ndarray:
    scorer = PairScorer(
        tokenizer, ESCI_LABELS, pack_scorer=load_pack_scorer(path, "cpu", threads=1)[0], tokens_per_call=512
    )
    return scorer.score(pairs)["relevance_score"].to_numpy()


@pytest.mark.parametrize(
    ("recipe", "largest_shift", "largest_spread", "operator"),
    [
        (Recipe("fp16", bits=16), 0.01, 0.005, "SimplifiedLayerNormalization"),
        (Recipe("int8", bits=8, by_token=True), 0.1, 0.01, "MatMulIntegerToFloat"),
        (Recipe("int8", bits=8), 0.1, 0.01, "MatMulNBits"),
        (Recipe("int8", bits=8, float_activations=True), 0.05, 1e-5, "MatMulNBits"),
        (Recipe("int4", bits=4), 0.7, 0.02, "MatMulNBits"),
    ],
    ids=str,
)
def test_a_smaller_precision_is_near_fp32_and_hardly_depends_on_the_pack(
    fp32_graph: Path,
    prompt_tokenizer: PromptTokenizer,
    pairs_pdf: pd.DataFrame,
    tmp_path: Path,
    recipe: Recipe,
    largest_shift: float,
    largest_spread: float,
    operator: str,
) -> None:
    source = fp32_graph
    if recipe.bits == 16:
        source = fp32_graph.with_name("fused.onnx")
        fuse_norms(fp32_graph, source)
    write_precision(source, recipe, tmp_path / "model.onnx")
    assert any(node.op_type == operator for node in onnx.load(tmp_path / "model.onnx").graph.node)
    shifts = np.abs(
        scores_of(tmp_path / "model.onnx", prompt_tokenizer, pairs_pdf)
        - scores_of(fp32_graph, prompt_tokenizer, pairs_pdf)
    )
    assert 0 < shifts.max() <= largest_shift
    scorer, _ = load_pack_scorer(tmp_path / "model.onnx", "cpu", threads=1)
    assert pack_spread(pairs_pdf, prompt_tokenizer, ESCI_LABELS, scorer, 1000) <= largest_spread


def test_layers_that_are_named_stay_in_float(fp32_graph: Path, tmp_path: Path) -> None:
    write_precision(fp32_graph, Recipe("int8", bits=8, float_layers=("down_proj",)), tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert [node.op_type for node in nodes if "down_proj" in node.name] == ["MatMul"] * 2
    assert {node.op_type for node in nodes if "up_proj" in node.name} == {"MatMulNBits"}


def test_embedding_rows_are_stored_in_two_bytes(fp32_graph: Path, tmp_path: Path) -> None:
    write_precision(fp32_graph, Recipe("int8", bits=8), tmp_path / "model.onnx")
    embedding = [
        tensor.data_type
        for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        if "embed_tokens" in tensor.name
    ]
    assert embedding == [onnx.TensorProto.FLOAT16]


def test_one_activation_scale_for_a_whole_tensor_is_seen_by_the_spread(
    fp32_graph: Path, prompt_tokenizer: PromptTokenizer, pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    """Negative control: onnxruntime's classic dynamic quantisation, and fp32 as it should be."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(fp32_graph, tmp_path / "model.onnx", op_types_to_quantize=["MatMul"])

    def spread(path: Path) -> float:
        scorer: PackScorer = load_pack_scorer(path, "cpu", threads=1)[0]
        return pack_spread(pairs_pdf, prompt_tokenizer, ESCI_LABELS, scorer, 1000, num_packings=5)

    assert spread(fp32_graph) <= 1e-5
    assert spread(tmp_path / "model.onnx") >= 1e-3


@pytest.mark.parametrize("location", ["../weights", "/etc/passwd", "inner/../../weights"])
def test_weights_outside_of_the_folder_are_refused(fp32_graph: Path, tmp_path: Path, location: str) -> None:
    path = tmp_path / "bundle" / "model.onnx"
    path.parent.mkdir()
    onnx.save(onnx.load(fp32_graph), path, save_as_external_data=True, location="weights")
    check_locations(path)
    model = onnx.load(path, load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"]
    entries[-1].value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=f"lie in {location!r}, outside of its folder"):
        check_locations(path)


def judged_pairs(num_queries: int = 40, seed: int = 0) -> pd.DataFrame:
    """Pairs with random grades and fp32 scores that go with them to some degree."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"query_id": np.repeat(np.arange(num_queries), 12).astype(str), "market": "us"})
    frame["product_id"] = np.arange(len(frame)).astype(str)
    frame["grade"] = rng.choice(["E", "S", "C", "I"], size=len(frame), p=[0.4, 0.3, 0.1, 0.2])
    frame["fp32"] = np.clip(0.4 * frame["grade"].map(GAINS) + rng.uniform(0, 0.6, len(frame)), 0, 1)
    return frame


def quality_of(frame: pd.DataFrame, scores: np.ndarray) -> Quality:
    gains = frame["grade"].map(GAINS).to_numpy()
    return measure_quality(frame["query_id"].to_numpy(), gains, frame["fp32"].to_numpy(), scores)


def test_auc_and_ndcg_are_those_of_the_evaluation() -> None:
    frame = judged_pairs()
    frame["other"] = frame["fp32"] + np.random.default_rng(1).normal(0, 0.05, len(frame))
    quality = quality_of(frame, frame["other"].to_numpy())
    metrics = evaluate_scores(
        frame, ["fp32", "other"], gains=GAINS, relevant_grades=["E"], irrelevant_grades=["I"]
    ).metrics.set_index(["ranking", "metric"])["value"]
    assert quality.auc == pytest.approx(metrics["other", "ROC-AUC"])
    assert quality.ndcg == pytest.approx(metrics["other", "nDCG@10"])
    assert quality.auc_loss.value == pytest.approx(metrics["fp32", "ROC-AUC"] - metrics["other", "ROC-AUC"])
    assert quality.ndcg_loss.value == pytest.approx(metrics["fp32", "nDCG@10"] - metrics["other", "nDCG@10"])
    assert quality.auc_loss.low < quality.auc_loss.value < quality.auc_loss.high


def test_scores_of_fp32_lose_nothing() -> None:
    frame = judged_pairs()
    quality = quality_of(frame, frame["fp32"].to_numpy())
    assert (quality.auc_loss.low, quality.auc_loss.high, quality.largest_shift) == (0, 0, 0)
    assert quality.spearman == pytest.approx(1)
    assert gate(quality, quality) == []


@pytest.mark.parametrize(("noise", "passes"), [(0.002, True), (0.3, False)])
def test_noise_passes_the_gate_only_where_it_is_small(noise: float, passes: bool) -> None:
    frame = judged_pairs()
    reference = quality_of(frame, frame["fp32"].to_numpy())
    noisy = frame["fp32"].to_numpy() + np.random.default_rng(2).normal(0, noise, len(frame))
    problems = gate(quality_of(frame, noisy), reference)
    assert (problems == []) is passes
    if not passes:
        assert [problem.split(" 0.")[0] for problem in problems] == ["loss of ROC-AUC", "loss of nDCG@10", "Spearman"]


def test_a_model_at_chance_proves_nothing() -> None:
    frame = judged_pairs()
    frame["fp32"] = 1 - frame["fp32"]
    quality = quality_of(frame, frame["fp32"].to_numpy())
    (problem,) = gate(quality, quality)
    assert problem == f"fp32 has ROC-AUC {quality.auc:.3f}, expected > 0.5: a model at chance proves nothing"
    assert quality.auc < 0.5


def test_pairs_that_cannot_be_ranked_are_refused() -> None:
    frame = judged_pairs(1)
    with pytest.raises(InputError, match="expected at least two queries and pairs of several grades, got 1 queries"):
        quality_of(frame, frame["fp32"].to_numpy())


def test_quality_pairs_are_whole_queries() -> None:
    frame = judged_pairs()
    chosen = whole_queries(frame, 60)
    assert chosen["query_id"].nunique() == 5
    assert (chosen.groupby("query_id").size() == 12).all()
    assert whole_queries(frame, 1)["query_id"].nunique() == 1
    assert len(whole_queries(frame, 10_000)) == len(frame)


@pytest.fixture(scope="module")
def judged(tiny_bundle: Path, pairs_pdf: pd.DataFrame) -> pd.DataFrame:
    """The pairs with the grades that the tiny model gives them: it ranks them perfectly."""
    scores = load_scorer(tiny_bundle, "cpu", threads=1).score(pairs_pdf)["relevance_score"]
    grades = pd.cut(scores.rank(pct=True), [0, 0.3, 0.5, 0.7, 1], labels=["I", "C", "S", "E"]).astype(str)
    return pairs_pdf.assign(query_id=pairs_pdf["query"], product_id=pairs_pdf["title"], grade=grades)


def test_a_bundle_at_8_bits_brings_its_table_and_tolerances(
    tiny_bundle: Path, judged: pd.DataFrame, pairs_pdf: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csrm.export.quality.MIN_SPEARMAN", 0.9)  # thirty pairs of a random model
    monkeypatch.setattr("csrm.export.quality.MAX_LOSS", 0.1)
    bundle = export_bundle(tiny_bundle.parent / "model", tmp_path / "bundle", pairs_pdf, judged, "int8")
    assert list(tmp_path.iterdir()) == [tmp_path / "bundle"]
    assert bundle.settings.precision == "int8"
    assert [report.precision for report in bundle.settings.precisions] == ["fp32", "int8"]
    fp32, int8 = bundle.settings.precisions
    assert fp32.quality is not None
    assert int8.quality is not None
    assert fp32.quality.auc == 1
    assert 0 < int8.quality.largest_shift < 0.2
    assert int8.num_bytes < 0.75 * fp32.num_bytes
    assert 1e-5 <= bundle.settings.pack_tolerance < bundle.settings.golden_tolerance
    assert bundle.settings.origin.adapter is not None
    assert (bundle.folder / "precisions.png").stat().st_size > 10_000
    first, second = (
        load_scorer(folder, "cpu", threads=1).score(pairs_pdf)["relevance_score"]
        for folder in (tiny_bundle, bundle.folder)
    )
    assert np.abs(first - second).max() == pytest.approx(int8.quality.largest_shift, abs=1e-4)


def test_a_precision_that_fails_its_gate_is_refused_and_nothing_written(
    tiny_bundle: Path, judged: pd.DataFrame, pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match=r"no recipe passed, the bundle was not written:\n  - int4, 4-bit .* loss of"):
        export_bundle(tiny_bundle.parent / "model", tmp_path / "bundle", pairs_pdf, judged, "int4")
    assert list(tmp_path.iterdir()) == []


def test_auto_keeps_fp32_where_nothing_else_passes_and_says_why(
    tiny_bundle: Path, judged: pd.DataFrame, pairs_pdf: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csrm.export.quality.MIN_SPEARMAN", 1.1)
    bundle = export_bundle(tiny_bundle.parent / "model", tmp_path / "bundle", pairs_pdf, judged, "auto")
    assert bundle.settings.precision == "fp32"
    verdicts = {report.recipe: report.verdict for report in bundle.settings.precisions}
    assert len(verdicts) == 1 + len(RECIPES["int8"]) + len(RECIPES["int4"])
    assert all("Spearman" in verdict for recipe, verdict in verdicts.items() if "-bit" in recipe)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int8", "must be proven on labelled pairs, and there are none"),
        ("auto", "must be proven on labelled pairs, and there are none"),
        ("fp16", "is for GPUs"),
        ("bf16", "is for GPUs"),
        ("int3", "expected auto or one of fp32, fp16, bf16, int8, int4"),
    ],
)
def test_a_precision_that_cannot_be_proven_is_refused_before_any_work(
    tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path, precision: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_bundle(tiny_bundle.parent / "model", tmp_path / "bundle", pairs_pdf, None, precision)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [
        ("auto", "cpu", ["int8", "int4"]),
        ("auto", "cuda", ["fp16", "bf16", "int8", "int4"]),
        ("auto", "cuda:1", ["fp16", "bf16", "int8", "int4"]),
        ("bf16", "cuda", ["bf16"]),
    ],
)
def test_auto_tries_16_bits_first_on_a_gpu(precision: str, device: str, expected: list[str]) -> None:
    assert wanted_precisions(precision, device, has_labels=True) == expected


def half_bundle(
    tiny_bundle: Path,
    model: PackedRelevanceModel,
    pairs: pd.DataFrame,
    folder: Path,
    precisions: Sequence[Precision],
    may_fall_back: bool,
) -> Bundle:
    """The end of an export, on the CPU: it computes float16, though slowly, and no bfloat16."""
    (folder / "bundle").mkdir()
    shutil.copyfile(tiny_bundle / "tokenizer.json", folder / "bundle" / "tokenizer.json")
    settings = load_bundle(tiny_bundle).settings.model_copy(update={"precisions": ()})
    (folder / "fp32").mkdir()
    export_packed_graph(model, folder / "fp32" / "model.onnx")
    tokenizer = PromptTokenizer.from_file(tiny_bundle / "tokenizer.json", settings.budgets)
    pack_scorer, _ = load_pack_scorer(folder / "fp32" / "model.onnx", "cpu", threads=1)
    scorer = PairScorer(tokenizer, ESCI_LABELS, pack_scorer=pack_scorer, tokens_per_call=512)
    scores = scorer.score(pairs)["relevance_score"]
    grades = pd.cut(scores.rank(pct=True), [0, 0.3, 0.5, 0.7, 1], labels=["I", "C", "S", "E"]).astype(str)
    judged = pairs.assign(query_id=pairs["query"], grade=grades)
    golden = choose_golden_pairs(pairs, scores.to_numpy(), tokenizer, "the fp32 graph")
    write_best_precision(
        folder / "fp32" / "model.onnx",
        pack_scorer,
        precisions,
        may_fall_back,
        pairs,
        judged,
        None,
        golden,
        settings,
        folder / "bundle",
    )
    return load_bundle(folder / "bundle")


@pytest.fixture
def loud(
    loud_model: PackedRelevanceModel, prompt_tokenizer: PromptTokenizer, pairs_pdf: pd.DataFrame
) -> Callable[[float], PackedRelevanceModel]:
    """The model with norms that read values as large as a number."""
    packs = list(build_packs(pair_groups(pairs_pdf, prompt_tokenizer)[0], pack_tokens=512))
    return lambda norm_input: make_loud(copy.deepcopy(loud_model), packs, norm_input)


def test_a_half_precision_bundle_says_its_largest_activation_and_bf16_is_not_tried(
    tiny_bundle: Path, loud: Callable[[float], PackedRelevanceModel], pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    bundle = half_bundle(tiny_bundle, loud(1000), pairs_pdf, tmp_path, ["fp16", "bf16"], may_fall_back=False)
    assert bundle.settings.precision == "fp16"
    fp32, fp16 = bundle.settings.precisions
    assert fp32.largest_activation is None
    assert fp16.largest_activation is not None
    assert 700 < fp16.largest_activation < 1020  # the last layer computes last tokens only
    said = f"float16, inside of norms in float32, largest activation {fp16.largest_activation:,.0f}: passed"
    assert said in bundle_card(bundle)
    assert fp16.num_bytes < 0.6 * fp32.num_bytes
    assert 0 < bundle.settings.golden_tolerance < 0.05


def test_where_float16_is_refused_the_report_says_layer_value_and_way_out_and_bf16_is_tried(
    tiny_bundle: Path, loud: Callable[[float], PackedRelevanceModel], pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    bundle = half_bundle(tiny_bundle, loud(70_000), pairs_pdf, tmp_path, ["fp16", "bf16"], may_fall_back=True)
    assert bundle.settings.precision == "fp32"
    _, fp16, bf16 = bundle.settings.precisions
    assert re.fullmatch(
        r"activations reach [4-7]\d,\d{3} in /model/layers\.\d/\S+, expected at most 30,000: float16 ends at "
        "65,504. Use bf16, which has the range of float32",
        fp16.verdict,
    )
    assert (fp16.num_bytes, fp16.pairs_per_s, fp16.quality) == (0, 0, None)
    assert fp16.largest_activation == bf16.largest_activation
    assert "NOT_IMPLEMENTED" in bf16.verdict  # on a CPU


def test_fp16_alone_is_refused_where_it_does_not_fit_and_nothing_is_finished(
    tiny_bundle: Path, loud: Callable[[float], PackedRelevanceModel], pairs_pdf: pd.DataFrame, tmp_path: Path
) -> None:
    with pytest.raises(ParityError, match=r"no recipe passed.*\n  - fp16, .*: activations reach .* Use bf16"):
        half_bundle(tiny_bundle, loud(70_000), pairs_pdf, tmp_path, ["fp16"], may_fall_back=False)
    assert [path.name for path in (tmp_path / "bundle").iterdir()] == ["tokenizer.json"]


def test_the_same_model_gives_the_same_bundle(tiny_bundle: Path, pairs_pdf: pd.DataFrame, tmp_path: Path) -> None:
    again = export_bundle(tiny_bundle.parent / "model", tmp_path / "bundle", pairs_pdf)
    first = load_bundle(tiny_bundle).settings
    assert again.settings.origin == first.origin
    assert (tmp_path / "bundle" / "golden.json").read_text() == (tiny_bundle / "golden.json").read_text()
