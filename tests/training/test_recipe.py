"""The recipe as a library calls it: a configuration in, a typed result out."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from csrm.artefacts.manifest import only_writer, verify_manifest
from csrm.config import InputSpec
from csrm.errors import ConfigError, InputError
from csrm.scoring.labels import Label
from csrm.training.data.judged import JudgedInputs, JudgedPairs
from csrm.training.distillation.rounds import Distillation
from csrm.training.distillation.soft_labels import read_labelled
from csrm.training.distillation.teacher import Teacher
from csrm.training.model.base import BaseModel
from csrm.training.recipe import train_relevance
from csrm.training.relevance import with_targets
from csrm.training.settings import TrainConfig, TranslationSettings
from csrm.training.summary import format_training
from csrm.training.trained import trained_scorer
from csrm.training.tuning import Tuning


@pytest.fixture
def config(loud_base_model: Path, tmp_path: Path) -> TrainConfig:
    """A relevance step of two steps on six judged pairs of two queries, and four more of split dev."""
    rows = [
        ("us", f"q{query}", f"p{product}", grade, "train" if query < 2 else "dev")
        for query in range(4)
        for product, grade in enumerate("ESI" if query < 2 else "EI")
    ]
    judgments = pd.DataFrame(rows, columns=["market", "query_id", "product_id", "grade", "split"])
    tables = {
        "judgments": judgments,
        "queries": judgments[["market", "query_id"]].drop_duplicates().assign(query=lambda rows: rows["query_id"]),
        "catalog": judgments[["market", "product_id"]].drop_duplicates().assign(title=lambda rows: rows["product_id"]),
    }
    specs = {}
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
        specs[name] = InputSpec(path=str(tmp_path / f"{name}.parquet"), format="parquet")
    return TrainConfig(
        markets={"us": "en"},
        inputs=JudgedInputs(**specs),
        base_model=BaseModel(folder=str(loud_base_model)),
        tuning=Tuning(method="full", max_steps=2),
        model_dir=str(tmp_path / "model"),
    )


def test_steps_that_are_left_out_have_no_result(config: TrainConfig, tmp_path: Path) -> None:
    config = config.model_copy(update={"tuning": config.tuning.model_copy(update={"eval_steps": 0})})
    result = train_relevance(config)
    assert result.kept is None
    assert (result.model_dir, result.num_pairs) == (tmp_path / "model", 6)
    assert verify_manifest(result.model_dir, "model")
    assert result.translation is None
    assert result.distillation is None
    assert result.evaluation is not None
    assert result.evaluation.counts["num_pairs"].tolist()[-1] == 4
    assert result.report_path == tmp_path / "model.stages" / "report.html"
    lines = format_training(result).splitlines()
    # Two packs of a query each, four of which are a step:
    assert (
        lines[0] == f"trained on 6 pairs, 2 steps of 4 packs, {result.length.epochs:.1f} epochs "
        f"({result.length.num_packs} packs): {tmp_path / 'model'}"
    )
    assert result.length.epochs == 8 / result.length.num_packs
    assert lines[-1] == f"report: {result.report_path}"


def test_without_a_dev_split_nothing_is_measured(config: TrainConfig) -> None:
    result = train_relevance(config.model_copy(update={"dev_split": "clean"}))
    assert result.evaluation is None
    assert [line.split(" ")[0] for line in format_training(result).splitlines()] == ["trained", "report:"]
    page = result.report_path.read_text(encoding="utf-8")
    assert "Stages" in page
    assert "Calibration" not in page


def test_a_limit_of_time_is_said_and_kept(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    texts = [
        ("ko", "en", f"수건 {number}", f"towel {number}x", "dev" if number < 3 else "train") for number in range(9)
    ]
    names = ["source_language", "target_language", "source_text", "target_text", "split"]
    pd.DataFrame(texts, columns=names).to_parquet(tmp_path / "parallel.parquet")
    parallel = InputSpec(path=str(tmp_path / "parallel.parquet"), format="parquet")
    translation = TranslationSettings(parallel_text=parallel, max_steps=1)
    result = train_relevance(config.model_copy(update={"max_minutes": 30.0, "translation": translation}))
    assert sum("minutes are left to train" in message for message in caplog.messages) == 2  # a stage each
    assert result.kept is not None
    assert result.length.num_steps == 2
    assert result.evaluation is not None
    assert result.translation is not None
    assert result.translation.quality is None
    assert "; not measured, for the time is limited" in format_training(result)


def test_what_dev_showed_on_the_way_is_not_measured_again(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = train_relevance(config)
    again = train_relevance(config)
    assert "not trained again" in caplog.text
    assert not [message for message in caplog.messages if message.startswith("scoring")]
    assert first.kept == again.kept
    assert first.kept is not None
    assert first.kept.num_steps == 2
    for result in (first, again):
        assert result.evaluation is not None
        metrics = result.evaluation.metrics.query("metric == 'ROC-AUC' and ranking == 'relevance_score'")
        assert metrics["value"].tolist() == [first.kept.value]
        assert f"dev chose step {first.kept.step} of 2: ROC-AUC" in format_training(result)
        assert "So dev flatters the model" in result.report_path.read_text(encoding="utf-8")

    plain = config.model_copy(update={"tuning": config.tuning.model_copy(update={"eval_steps": 0})})
    assert train_relevance(plain).kept is None
    assert "scoring the 4 pairs of split dev" in caplog.messages


def test_a_limit_of_time_is_for_one_model(config: TrainConfig) -> None:
    values = {**config.model_dump(), "max_minutes": 10, "distillation": {}}
    with pytest.raises(ValueError, match="max_minutes and distillation: rounds train many models"):
        TrainConfig.model_validate(values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the processor")
def test_a_precision_that_the_machine_lacks_ends_a_training_before_its_tables_are_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    broken = config.inputs.model_copy(update={"judgments": InputSpec(path="nowhere")})
    tuning = config.tuning.model_copy(update={"precision": "bf16"})
    with pytest.raises(ConfigError, match=r"tuning\.precision bf16: this processor has no instructions"):
        train_relevance(config.model_copy(update={"inputs": broken, "tuning": tuning}))


def test_two_trainings_into_one_folder_are_kept_apart(config: TrainConfig, tmp_path: Path) -> None:
    with only_writer(tmp_path / "model"), pytest.raises(ConfigError, match="another process writes it now"):
        train_relevance(config)
    assert not (tmp_path / "model.unfinished").exists()


def test_labels_of_one_gain_are_refused(config: TrainConfig) -> None:
    values = config.model_dump() | {"labels": [Label("I", " no", 0.0), Label("E", " yes", 0.0)]}
    with pytest.raises(ValidationError, match="all have the gain 0, so every pair would have this score"):
        TrainConfig.model_validate(values)


def test_a_student_learns_the_order_of_a_teacher_in_a_market_without_labels(
    config: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = ["tent", "mug", "stove", "lamp"]
    rows = [(f"q{query}", f"t{product}") for query in range(12) for product in range(4)]
    scores = pd.DataFrame(rows, columns=["query_id", "product_id"]).assign(market="tw")
    scores["score"] = -scores["product_id"].str[1:].astype(float)
    texts = {
        "catalog": pd.DataFrame({"market": "tw", "product_id": [f"t{n}" for n in range(4)], "title": titles}),
        "queries": pd.DataFrame(
            {"market": "tw", "query_id": [f"q{n}" for n in range(12)], "query": [f"camp {n}" for n in range(12)]}
        ),
        "scores": scores,
    }
    specs = {}
    for name, table in texts.items():
        table.to_parquet(tmp_path / f"tw_{name}.parquet")
        specs[name] = {"path": str(tmp_path / f"tw_{name}.parquet"), "format": "parquet"}
    values = config.model_dump() | {
        "teacher": {"inputs": specs, "markets": {"tw": "zh-TW"}},
        "tuning": {"method": "full", "max_steps": 60, "learning_rate": 3e-3, "packs_per_step": 4},
    }
    taught = TrainConfig.model_validate(values)
    result = train_relevance(taught)
    assert result.taught is not None
    assert result.taught.num_pairs == 48
    assert "teacher: 48 pairs without a label to learn; label probabilities assumed" in format_training(result)
    new = pd.DataFrame({"market": "tw", "language": "zh-TW", "query": "camp 77", "title": titles})
    found = trained_scorer(result.model_dir, "fp32").score(new)["relevance_score"]
    assert found.is_monotonic_decreasing


def test_labels_of_judges_are_learnt_by_their_weight_and_how_far_they_agree_is_told(
    config: TrainConfig, tmp_path: Path
) -> None:
    judgments = pd.read_parquet(tmp_path / "judgments.parquet")
    person = judgments.assign(judge="person", weight=1.0)
    other = {"E": "S", "S": "E", "I": "I"}
    model = judgments.assign(judge="<model>", weight=0.25, grade=judgments["grade"].map(other))
    pd.concat([person, model]).to_parquet(tmp_path / "judgments.parquet")
    result = train_relevance(config)
    assert result.num_pairs == 6
    assert result.agreement is not None
    # I of both splits, 4 of 10 pairs; shares E 6, S 6 and I 8 of 20: 0.34 by chance
    lines = format_training(result).splitlines()
    assert lines[:3] == [
        "judges: 2; 100.0% of 10 pairs have more than one; two of a pair agree in 40.0%, Fleiss' kappa 0.09",
        "  <model>: 10 labels, mean weight 0.25, agrees with the others in 40.0%",
        "  person: 10 labels, mean weight 1, agrees with the others in 40.0%",
    ]
    page = result.report_path.read_text(encoding="utf-8")
    assert "&lt;model&gt;" in page
    assert "40.0%" in page
    with JudgedPairs(config.inputs, config.markets) as pairs:
        (batch,) = pairs.groups("train", 8, 0)
    targets = with_targets(batch, config).set_index("grade")["target"]
    assert set(map(tuple, targets["E"].tolist())) == {(0, 0, np.float32(0.2), np.float32(0.8))}
    assert set(map(tuple, targets["I"].tolist())) == {(1, 0, 0, 0)}


def test_distillation_starts_from_the_grade_of_the_largest_weight(config: TrainConfig, tmp_path: Path) -> None:
    judgments = pd.read_parquet(tmp_path / "judgments.parquet")
    person = judgments.assign(judge="person", weight=0.5)
    pd.concat([person, person.assign(judge="model", weight=0.25, grade="C")]).to_parquet(tmp_path / "judgments.parquet")
    distillation = Distillation(rounds=1, num_folds=1, min_gain=0)
    result = train_relevance(config.model_copy(update={"distillation": distillation}))
    assert result.distillation is not None
    soft_labels = result.distillation.rounds[1].soft_labels
    given = read_labelled(soft_labels).to_pandas()
    assert given["grade"].value_counts().to_dict() == {"E": 2, "S": 2, "I": 2}
    with JudgedPairs(config.inputs, config.markets) as pairs:
        (batch,) = pairs.groups("train", 8, 0, soft_labels=soft_labels)
    assert batch["weight"].tolist() == [0.5] * 6


def test_a_teacher_has_pairs_that_nobody_judged(config: TrainConfig) -> None:
    inputs = {name: getattr(config.inputs, name) for name in ("catalog", "queries")}
    inputs["candidates"] = config.inputs.judgments
    teacher = Teacher.model_validate({"model": "any", "inputs": inputs, "markets": {"us": "en"}})
    with pytest.raises(
        InputError, match=r"no pairs of \{'us': 'en'\} but judged ones and those of queries that measure"
    ):
        train_relevance(config.model_copy(update={"teacher": teacher}))
