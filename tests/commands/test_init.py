import importlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csrm.bundle.loading import load_bundle
from csrm.cli import run_job
from csrm.commands import init
from csrm.commands.build_candidates import CandidateConfig
from csrm.commands.init import copy_configuration, shipped_configuration
from csrm.commands.run import NIGHT
from csrm.config import InputSpec, Settings, load_config
from csrm.errors import ConfigError, CsrmError
from csrm.export.settings import ExportConfig
from csrm.export.vote import VoteSettings
from csrm.night.settings import ScoringConfig
from csrm.training.model.base import BaseModel
from csrm.training.settings import TrainConfig

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_configuration_of_a_checkout_is_copied_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shipped_configuration() == ROOT / "conf"
    assert init.main(["conf"]) == 0
    assert contents(tmp_path / "conf") == contents(ROOT / "conf")
    assert (tmp_path / "conf" / "deploy" / "start.sh").stat().st_mode & 0o111
    assert "csrm demo" in capsys.readouterr().out


def test_in_a_folder_of_another_name_the_settings_name_its_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert init.main(["settings/tw"]) == 0
    settings = load_config("settings/tw/score_catalog.yaml", ScoringConfig)
    assert settings.bundle == "settings/tw/demo_bundle"
    assert load_bundle(settings.bundle) is not None
    assert "csrm score-catalog --config settings/tw/score_catalog.yaml" in capsys.readouterr().out


def test_a_folder_that_has_files_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    assert run_job(init.main, [str(tmp_path)]) == 2
    assert "with mine.yaml. Name another folder" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.yaml": b"mine"}


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "conf").write_text("a file")
    with pytest.raises(ConfigError, match=r"conf' cannot be written: .*Not a directory.* Name another folder"):
        copy_configuration(ROOT / "conf", tmp_path / "conf")
    assert (tmp_path / "conf").read_text() == "a file"


def test_code_without_its_configuration_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csrm.__path__", [str(tmp_path / "csrm")])
    with pytest.raises(ConfigError, match=r"expected the configuration files in .*csrm/conf', found none"):
        shipped_configuration()


TABLES = {
    "catalog": {"locale": ["kr", "tw"], "sku": ["p1", "p2"], "name": ["무선 마우스", "無線滑鼠"], "Brand": ["A", None]},
    "queries": {"locale": ["kr", "tw"], "qid": [1, 2], "keyword": ["마우스", "滑鼠"], "searches": [5, 3]},
    "judgments": {
        "locale": ["kr", "kr"],
        "qid": [1, 1],
        "sku": ["p1", "p2"],
        "label": [1, 0],
        "split": ["train", "dev"],
    },
    "parallel-text": {"src_lang": ["ko"], "tgt_lang": ["zh-TW"], "src": ["마우스"], "tgt": ["滑鼠"]},
}
LANGUAGES = ["--language", "kr=ko", "--language", "tw=zh-TW"]


def init_words(folder: Path, *names: str, **changes: dict[str, list[object]]) -> list[str]:
    """Words of a command that names tables, which are written before."""
    words = [str(folder / "mine"), *LANGUAGES]
    for name in names:
        path = folder / f"{name}.parquet"
        pq.write_table(pa.table(changes.get(name) or TABLES[name]), path)
        words += [f"--{name}", str(path)]
    return words


def loaded(folder: Path) -> dict[str, Settings]:
    """The settings of each file but the shared one, by the job that it is for."""
    settings = {}
    for path in folder.glob("*.yaml"):
        if path.name != "market.yaml":
            values = vars(importlib.import_module(f"csrm.commands.{path.stem}")).values()
            (kind,) = {
                value
                for value in values
                if isinstance(value, type) and issubclass(value, Settings) and value.__name__.endswith("Config")
            }
            settings[path.stem] = load_config(path, kind)
    return settings


def test_tables_become_one_shared_file_and_a_file_for_each_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(init.main, init_words(tmp_path, *TABLES)) == 0
    settings = loaded(tmp_path / "mine")
    chain = {step.file.removesuffix(".yaml") for step in NIGHT if not step.is_optional}
    assert chain | {"train", "export_bundle", "evaluate", "explain", "launch_report", "rollback"} <= set(settings)

    night = settings["score_catalog"]
    assert isinstance(night, ScoringConfig)
    assert night.markets == {"kr": "ko", "tw": "zh-TW"}
    assert night.inputs.catalog.columns == {"market": "locale", "product_id": "sku", "title": "name", "brand": "Brand"}
    assert night.inputs.queries.columns["frequency"] == "searches"
    assert (night.tables, night.bundle) == (str(tmp_path / "mine/tables"), str(tmp_path / "mine/bundle"))
    export = settings["export_bundle"]
    assert isinstance(export, ExportConfig)
    assert export.vote == VoteSettings(words=True)
    printed = capsys.readouterr().out
    assert "grades: 1 1, 0 0 (relevant or not); judgments: 1 dev, 1 train" in printed
    assert f"csrm run night --config {tmp_path / 'mine'}" in printed


def test_tables_in_a_schema_are_found_by_trainings_in_their_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = init_words(tmp_path, *TABLES)
    assert run_job(init.main, [*words, "--tables", "schema:main.csrm"]) == 2
    assert "expected a folder, got a schema, whose location only Spark knows" in capsys.readouterr().err

    place = "schema:main.csrm?folder=s3://bucket/csrm"
    assert run_job(init.main, [*words, "--tables", place]) == 0
    settings = loaded(tmp_path / "mine")
    night, train = settings["score_catalog"], settings["train"]
    assert isinstance(night, ScoringConfig)
    assert isinstance(train, TrainConfig)
    assert night.tables == place
    assert train.inputs.retrieval_table is not None
    assert train.inputs.retrieval_table.path == "s3://bucket/csrm/retrieval_table"


def test_labels_elsewhere_are_learnt_with_translation_and_title_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(init.main, [*init_words(tmp_path, *TABLES), "--base-model", "models/gemma.gguf"]) == 0
    train = loaded(tmp_path / "mine")["train"]
    assert isinstance(train, TrainConfig)
    assert (train.markets, train.grade_labels) == ({"kr": "ko"}, {"0": "no", "1": "yes"})
    assert train.base_model == BaseModel(folder="models", gguf_file="gemma.gguf")
    assert train.translation is not None
    assert train.translation.parallel_text.columns["source_text"] == "src"
    assert train.title_pairs is not None
    assert train.title_pairs.markets == {"kr": "ko", "tw": "zh-TW"}
    assert (train.distillation, train.tuning.precision) == (None, "auto")
    assert (
        "recipe labels-elsewhere: tw: no judgments. Training takes translation, the labels of kr"
        in capsys.readouterr().out
    )


def test_tables_of_one_market_need_no_column_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = {name: {key: values for key, values in TABLES[name].items() if key != "locale"} for name in TABLES}
    words = init_words(tmp_path, "catalog", "queries", "judgments", **tables)
    assert run_job(init.main, words) == 2  # of which of the two languages' markets is not said
    words = [word for word in words if word not in LANGUAGES]
    assert "or of which market all rows are, with its language: --language MARKET=CODE, once" in capsys.readouterr().err
    assert run_job(init.main, [*words, "--language", "us=en"]) == 0
    night = loaded(tmp_path / "mine")["score_catalog"]
    assert isinstance(night, ScoringConfig)
    assert night.markets == {"us": "en"}
    assert (night.inputs.catalog.market, night.inputs.queries.market) == ("us", "us")
    assert "market" not in night.inputs.catalog.columns
    printed = capsys.readouterr().out
    assert "market is 'us' in each row" in printed
    assert "recipe own-labels: every market has judgments" in printed


def test_a_column_that_is_no_market_is_named_and_can_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables = {name: {key: values for key, values in TABLES[name].items() if key != "locale"} for name in TABLES}
    tables["catalog"] |= {"country": ["CN", "VN"]}  # where a product is made
    words = [word for word in init_words(tmp_path, "catalog", "queries", **tables) if word not in LANGUAGES]
    words += ["--language", "us=en"]
    assert run_job(init.main, words) == 2
    assert "the catalog has no market 'us', its column 'country' has ['CN', 'VN']" in capsys.readouterr().err
    assert run_job(init.main, [*words, "--column", "catalog.market=null"]) == 0
    night = loaded(tmp_path / "mine")["score_catalog"]
    assert isinstance(night, ScoringConfig)
    assert night.inputs.catalog.market == "us"
    assert "market" not in night.inputs.catalog.columns


def test_own_labels_are_learnt_with_random_negatives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = TABLES["judgments"] | {"locale": ["kr", "tw"]}
    words = init_words(tmp_path, "catalog", "queries", "judgments", judgments=judged)
    assert run_job(init.main, words) == 0
    train = loaded(tmp_path / "mine")["train"]
    assert isinstance(train, TrainConfig)
    assert train.tuning.random_negatives == 1.0
    assert (train.translation, train.title_pairs, train.tuning.max_steps) == (None, None, None)
    assert "launch_report" not in loaded(tmp_path / "mine")
    assert "recipe own-labels: every market has judgments" in capsys.readouterr().out
    (tmp_path / "no_dev").mkdir()
    undivided = {name: values for name, values in judged.items() if name != "split"}
    words = init_words(tmp_path / "no_dev", "catalog", "queries", "judgments", judgments=undivided)
    assert run_job(init.main, words) == 0
    export = loaded(tmp_path / "no_dev" / "mine")["export_bundle"]
    assert isinstance(export, ExportConfig)
    assert export.vote is None  # no split dev would choose its weights


def test_a_night_scores_the_candidates_that_it_builds_with_the_given_ones_among_them(tmp_path: Path) -> None:
    pairs: dict[str, list[object]] = {"locale": ["kr"], "qid": [1], "sku": ["p1"]}
    assert run_job(init.main, init_words(tmp_path, "catalog", "queries", "candidates", candidates=pairs)) == 0
    assert load_config(tmp_path / "mine" / "score_catalog.yaml", ScoringConfig).inputs.candidates is None
    built = load_config(tmp_path / "mine" / "build_candidates.yaml", CandidateConfig)
    assert built.inputs.candidates is not None
    assert built.inputs.candidates.path == str(tmp_path / "candidates.parquet")


def test_without_labels_a_reranker_judges_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*init_words(tmp_path, "catalog", "queries"), "--base-model", "models/Qwen3-Reranker-0.6B"]
    assert run_job(init.main, words) == 0
    settings = loaded(tmp_path / "mine")
    assert not {"train", "evaluate"} & set(settings)
    export, shown = settings["export_bundle"], load_config(ROOT / "conf" / "export_bundle_reranker.yaml", ExportConfig)
    assert isinstance(export, ExportConfig)
    assert export.reranker == shown.reranker
    assert (export.markets, export.inputs.judgments) == ({"kr": "ko", "tw": "zh-TW"}, None)
    assert export.inputs.candidates == InputSpec(path=str(tmp_path / "mine/tables/candidates"))
    assert export.bundle_dir == settings["score_catalog"].bundle
    printed = capsys.readouterr().out
    assert "recipe no-labels: no market has judgments" in printed
    commands = [line.split()[1] for line in printed.splitlines() if line.startswith("  csrm ")]
    assert commands == ["build-candidates", "export-bundle", "run"]


def test_all_that_is_missing_is_said_at_once_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = init_words(tmp_path, "catalog", "queries", catalog={"sku": [1], "name": ["a"]}, queries={"qid": [1]})
    assert run_job(init.main, words) == 2
    message = capsys.readouterr().err
    assert message.count("no column stands for market") == 2
    assert "--column queries.query=NAME" in message
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine", "--catalog", "c"], r"expected --catalog and --queries, .*\['queries'\] is missing"),
        (
            ["mine", "--catalog", "c", "--queries", "q", "--column", "title"],
            "--column 'title': expected a pair such as",
        ),
        (["mine", "--catalog", "c", "--queries", "q", "--grades", "a=b"], "--grades 'a=b': expected numbers"),
        (["mine", "--catalog", "nowhere", "--queries", "q"], "catalog 'nowhere': cannot be read"),
        (["mine", "--catalog", "c", "--queries", "q", "--grades", "a=1"], "--grades: expected --judgments PATH"),
        (["mine", "--language", "tw=zh-TW"], "expected --catalog and --queries beside other options"),
        (["taken", "--catalog", "c", "--queries", "q"], "'taken' cannot be written: .*Not a directory"),
    ],
)
def test_arguments_that_say_nothing_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(CsrmError, match=message):
        init.main(words)


def test_notes_name_what_a_person_should_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judged = {name: values for name, values in TABLES["judgments"].items() if name != "split"}
    asked = {name: values[:1] for name, values in TABLES["queries"].items()}
    words = init_words(tmp_path, "catalog", "queries", "judgments", judgments=judged, queries=asked)
    assert run_job(init.main, words) == 0
    printed = capsys.readouterr().out
    assert "note: markets without queries: tw." in printed
    assert "note: judgments have no rows of split dev" in printed
    assert "note: judgments have no rows of split test or dev, so evaluate.yaml takes all judged pairs." in printed


def test_a_note_names_judgments_of_markets_that_are_called_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged = TABLES["judgments"] | {"locale": ["KR", "KR"]}
    assert run_job(init.main, init_words(tmp_path, "catalog", "queries", "judgments", judgments=judged)) == 0
    assert "note: judgments of markets that the catalog lacks: KR. No job reads them" in capsys.readouterr().out
