"""Fixtures that more than one test module uses."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is imported: on few cores, idle threads that spin cost more than they give to tiny models.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pandas as pd
import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from csrm.scoring.scorer import PairScorer
    from csrm.scoring.tokenization import PromptTokenizer
    from csrm.training.model.base import BaseModel
    from csrm.training.model.relevance import PackedRelevanceModel

# Short Spark programs spend most of their time in the JVM's optimising compiler; jobs that tests submit inherit this.
# Without that compiler the code cache is small by default, and once it is full nothing is compiled any more. Loading
# classes is what starting costs most; .ci/setup keeps them in an archive, see spark_classes.py.
CLASSES = Path(sys.prefix) / "spark-classes.jsa"
JVM_OPTIONS = (
    f"-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m -XX:SharedArchiveFile={CLASSES} "
    "-Xlog:cds=off -Xlog:cds+dynamic=off"
)
os.environ.setdefault("SPARK_SUBMIT_OPTS", JVM_OPTIONS)
os.environ.setdefault("SPARK_DAEMON_JAVA_OPTS", JVM_OPTIONS)


hypothesis.settings.register_profile("busy", deadline=None)  # a busy machine is no fault of an example
hypothesis.settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where downloaded files are; tests that need one are skipped without it."""
    parser.addoption("--esci", help="folder with products.parquet and judgments.tsv.gz, a part of ESCI")
    parser.addoption("--base-model", help="GGUF file of a small language model that knows English")
    parser.addoption("--encoder-model", help="folder of multilingual-e5-small, in the layout of sentence-transformers")


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator["SparkSession"]:
    """One real session with Delta for the whole test run; its scratch files are under a temporary folder."""
    from csrm.spark.session import build_session

    os.environ["SPARK_LOCAL_DIRS"] = str(tmp_path_factory.mktemp("spark-local"))
    session = build_session("csrm-tests")
    # On a handful of rows, generating code and planning by stages take longer than running without them. Jobs that
    # tests submit, and the demo, keep Spark's default.
    session.conf.set("spark.sql.codegen.wholeStage", "false")
    session.conf.set("spark.sql.codegen.factoryMode", "NO_CODEGEN")
    session.conf.set("spark.sql.adaptive.enabled", "false")  # a job for each stage, and its plan made again
    yield session
    session.stop()


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def pairs_pdf() -> pd.DataFrame:
    """Thirty pairs of six queries in three languages (csrm.scoring.PAIR_COLUMNS), with nulls and ragged lengths."""
    queries = [
        ("kr", "ko", "여성 운동화", ["경량 스니커즈", "여성용 러닝화 240"]),
        ("kr", "ko", "노트북 가방", None),
        ("tw", "zh-TW", "透明手機殼", ["軍規防摔透明手機殼"]),
        ("tw", "zh-TW", "登山外套", []),
        ("us", "en", "wireless mouse", ["Silent Wireless Mouse 2.4G", "Ergonomic Mouse", "Mouse Pad XL"]),
        ("us", "en", "gift", ["🎁 gift box"]),
    ]
    products = [
        ("하라 쿠션 운동화", "하라", "신발", {"색상": "흰색", "사이즈": "240"}),
        ("磁吸手機殼 iPhone 15 " + "防摔 " * 12, None, "手機配件", None),
        ("Rechargeable Wireless Mouse, 1600 DPI", "Norvia", "Electronics", {"color": "black"}),
        ("x", None, None, {}),
        ("防水登山外套 男款 黑色", "Hala", None, {"材質": "尼龍", "尺寸": "L"}),
    ]
    rows = [(*query, *product) for query in queries for product in products]
    columns = ["market", "language", "query", "retrieved_titles", "title", "brand", "category", "attributes"]
    return pd.DataFrame(rows, columns=columns)


@pytest.fixture(scope="session")
def loud_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random base model whose weights are large enough that its scores differ from pair to pair."""
    from tokenizers import Tokenizer

    from csrm.training.model.tiny import write_tiny_base_model

    tokenizer = Tokenizer.from_file(str(GOLDEN / "tokenizer.json"))
    return write_tiny_base_model(tmp_path_factory.mktemp("base"), tokenizer, initializer_range=0.25)


@pytest.fixture(scope="session")
def prompt_tokenizer() -> "PromptTokenizer":
    """Tokenizer of the golden prompts with the default budgets."""
    from csrm.scoring.tokenization import Budgets, PromptTokenizer

    return PromptTokenizer.from_file(GOLDEN / "tokenizer.json", Budgets())


@pytest.fixture(scope="session")
def loud_model(loud_base_model: Path, prompt_tokenizer: "PromptTokenizer") -> "PackedRelevanceModel":
    """Untrained relevance model on the loud base model, with graded labels."""
    from csrm.scoring.labels import ESCI_LABELS
    from csrm.training.model.base import BaseModel, load_language_model
    from csrm.training.model.relevance import PackedRelevanceModel

    language_model = load_language_model(BaseModel(folder=str(loud_base_model)))
    return PackedRelevanceModel(language_model, prompt_tokenizer.label_ids(ESCI_LABELS)).eval()


@pytest.fixture(scope="session")
def train_on() -> "Callable[..., PairScorer]":
    """Train on judged pairs (PAIR_COLUMNS and grade): train_on(pairs, start, output_dir, budgets, **tuning)."""
    from csrm.scoring.labels import ESCI_LABELS
    from csrm.scoring.tokenization import Budgets, PromptTokenizer
    from csrm.training.data.packs import judged_packs
    from csrm.training.stage import train_stage
    from csrm.training.targets import one_hot_targets
    from csrm.training.trained import start_tokenizer_json
    from csrm.training.tuning import Tuning

    def train(
        pairs: pd.DataFrame,
        start: "BaseModel | Path",
        output_dir: Path,
        budgets: Budgets = Budgets(),  # noqa: B008
        **settings: object,
    ) -> "PairScorer":
        tuning = Tuning(**settings)
        shuffled = pairs.sample(frac=1.0, random_state=tuning.seed)
        place = shuffled.groupby("query").cumcount() // tuning.pairs_per_prefix
        shuffled["group_number"] = shuffled.groupby(["query", place], sort=False).ngroup()
        shuffled["query_id"], shuffled["product_id"] = shuffled["query"], shuffled["title"]
        shuffled["target"] = list(one_hot_targets(shuffled["grade"], ESCI_LABELS, None))
        tokenizer = PromptTokenizer.from_json(start_tokenizer_json(start), budgets)
        packs = judged_packs([shuffled.sort_values("group_number", kind="stable")], tokenizer, 512)
        return train_stage(packs, start, tuning, ESCI_LABELS, budgets, 512, output_dir)

    return train


@pytest.fixture(scope="session")
def tiny_bundle(
    loud_base_model: Path,
    pairs_pdf: pd.DataFrame,
    train_on: "Callable[..., PairScorer]",
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A real bundle: a tiny model, trained for two steps and exported by the code that does it for real ones."""
    from csrm.export.bundle import export_bundle
    from csrm.training.model.base import BaseModel

    folder = tmp_path_factory.mktemp("bundle")
    judged = pairs_pdf.assign(grade=["E", "S", "C", "I", "I"] * 6)
    train_on(judged, BaseModel(folder=str(loud_base_model)), folder / "model", max_steps=2, learning_rate=1e-4)
    export_bundle(str(folder / "model"), folder / "bundle", judged)
    return folder / "bundle"


@pytest.fixture(scope="session")
def encoder_at(tmp_path_factory: pytest.TempPathFactory) -> "Callable[..., Path]":
    """Export a tiny random encoder: encoder_at(folder, **settings); other settings make another one."""
    from csrm.export.encoder import EncoderExportConfig, export_encoder
    from tests.export.encoder_models import write_encoder_model

    model_dir = write_encoder_model(tmp_path_factory.mktemp("model"), "bert")
    inputs = {"catalog": {"path": "unread"}, "queries": {"path": "unread"}}

    def export(folder: Path, **settings: object) -> Path:
        values = {"model_dir": str(model_dir), "encoder_dir": str(folder), "inputs": inputs, **settings}
        export_encoder(EncoderExportConfig.model_validate(values), ["tent", "藍牙耳機"], ["tent"])
        return folder

    return export


@pytest.fixture(scope="session")
def tiny_encoder(encoder_at: "Callable[..., Path]", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real encoder: a tiny random model, exported by the code that does it for real ones."""
    return encoder_at(tmp_path_factory.mktemp("encoders") / "encoder")
