import re
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from csrm.cli import setting_arguments
from csrm.commands import report, score_catalog
from csrm.config import (
    InputSpec,
    Markets,
    Settings,
    TablesDir,
    folder_of_tables,
    load_config,
    make_folder,
    resolved_settings,
)
from csrm.errors import ConfigError
from csrm.night.settings import ScoringConfig
from csrm.operations.rollback import RollbackConfig

CONF = Path(__file__).parent.parent / "conf"


class ExampleConfig(Settings):
    market: str
    """Storefront."""
    learning_rate: float = 1.0e-3
    """Step size."""
    inputs: dict[str, InputSpec] = Field(default_factory=dict)
    """Tables."""


def written(folder: Path, text: str) -> Path:
    path = folder / "example.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_and_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "market: kr\ninputs: {catalog: {path: c.parquet, format: parquet}}")
    config = load_config(path, ExampleConfig)
    assert config == ExampleConfig(market="kr", inputs={"catalog": InputSpec(path="c.parquet", format="parquet")})
    assert config.learning_rate == 1e-3


def test_overrides_replace_and_add_values(tmp_path: Path) -> None:
    path = written(tmp_path, "market: kr")
    config = load_config(path, ExampleConfig, ["market=tw", "inputs.catalog.path=x", "learning_rate=2.0e-5"])
    assert (config.market, config.inputs["catalog"].path, config.learning_rate) == ("tw", "x", 2e-5)


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    path = written(tmp_path, "market: no\nlearning_rate: fast\nmarkets: 1")
    with pytest.raises(ConfigError) as error:
        load_config(path, ExampleConfig)
    message = str(error.value)
    assert "3 problems" in message
    assert "market: Input should be a valid string (got False); put it in quotes in YAML" in message
    assert "learning_rate: " in message
    assert "markets: Extra inputs are not permitted" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a", "expected a mapping"), ("a: [", "is not YAML"), ("", "expected a mapping")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text), ExampleConfig)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*Is the path right"):
        load_config(tmp_path / "nowhere.yaml", ExampleConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [("market", "expected key=value"), ("market.a=1", "single value"), ("market=[", "not YAML")],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, "market: kr"), ExampleConfig, [override])


def test_setting_arguments_are_read_back_as_they_were(tmp_path: Path) -> None:
    inputs = {"catalog": {"path": "a b: [c", "format": "csv", "options": {"sep": "\t"}}}
    arguments = setting_arguments(market="no", inputs=inputs)
    assert arguments[::2] == ["--set", "--set"]
    config = load_config(written(tmp_path, "market: kr"), ExampleConfig, arguments[1::2])
    assert config == ExampleConfig(market="no", inputs={"catalog": InputSpec(**inputs["catalog"])})


ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("market: 2026-02-30", "is not YAML: day "),
        ("market: 0x_", "is not YAML: invalid literal"),
        ("market: !!int abc", "is not YAML: invalid literal"),
        ("market: !!timestamp x", "is not YAML: "),
        ("market: " + "[" * 3_000, "is not YAML: too many brackets"),
        (ALIAS_BOMB, "is not YAML: it stands for more than 100,000 values"),
        ("market: &m [*m]", "is not YAML: a value contains itself"),
        ("market: kr\nlearning_rate: 1.0\nmarket: tw", r"is not YAML: the keys \['market'\] are there twice"),
        ("market: kr\nlearning_rate: .nan", "learning_rate: Input should be a finite number"),
        ("market: kr\nlearning_rate: -.inf", "learning_rate: Input should be a finite number"),
    ],
)
def test_odd_values_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"config '.*example\.yaml'.*") as error:
        load_config(written(tmp_path, text), ExampleConfig)
    assert re.search(message, str(error.value))


@pytest.mark.parametrize("value", ["2026-02-30", "0x_", "!!int abc", "!!timestamp x", "[" * 3_000, "9" * 5_000])
def test_odd_values_on_the_command_line_are_refused_too(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set 'market=.*the value is not YAML"):
        load_config(written(tmp_path, "market: kr"), ExampleConfig, [f"market={value}"])


@pytest.mark.parametrize("name", ["", "__HIVE_DEFAULT_PARTITION__"])
def test_a_market_that_no_partition_can_be_called_is_refused(tmp_path: Path, name: str) -> None:
    class MarketsConfig(Settings):
        markets: Markets
        """Markets."""
        tables: TablesDir
        """Folder."""

    with pytest.raises(
        ConfigError, match=r"(?s)markets.*is no name for a market.*tables: String should have at least 1"
    ):
        load_config(written(tmp_path, f"markets: {{'{name}': ko}}\ntables: ''"), MarketsConfig)


@pytest.mark.parametrize("tables", ["schema:?folder=x", "schema:csrm?folder=", "schema:csrm?path=x"])
def test_a_place_of_tables_that_names_no_schema_is_refused(tables: str) -> None:
    with pytest.raises(ConfigError, match=r"tables: .*expected schema:NAME or schema:NAME\?folder=URI"):
        load_config(CONF / "rollback.yaml", RollbackConfig, [f"tables={tables}"])


def test_where_no_spark_is_a_schema_needs_its_folder() -> None:
    assert folder_of_tables("data/csrm", "--tables") == "data/csrm"
    assert folder_of_tables("schema:main.csrm?folder=s3://bucket/csrm", "--tables") == "s3://bucket/csrm"
    with pytest.raises(ConfigError, match=r"--tables 'schema:csrm': expected a folder, got a schema.*DESCRIBE"):
        folder_of_tables("schema:csrm", "--tables")
    with pytest.raises(ConfigError, match=r"--tables 'schema:': expected schema:NAME"):
        folder_of_tables("schema:", "--tables")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("devise=cpu", "devise: Extra inputs are not permitted (got 'cpu'). Is it device?"),
        (
            "audit.deleted_shares=0.1",
            "audit.deleted_shares: Extra inputs are not permitted (got 0.1). Is it deleted_share?",
        ),
        ("audit.hang_minutes=5", "audit.hang_minutes: Extra inputs are not permitted (got 5). Is it hang_minutes?"),
        ("rejected_share=0.1", "rejected_share: Extra inputs are not permitted (got 0.1). Is it audit.rejected_share?"),
        ("inputs.catalog.pth=x", "inputs.catalog.pth: Extra inputs are not permitted (got 'x'). Is it path?"),
        ("zzz=1", "zzz: Extra inputs are not permitted (got 1)"),
    ],
)
def test_an_unknown_key_names_what_it_may_be_meant_for(override: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(CONF / "score_catalog.yaml", ScoringConfig, [override])
    assert str(error.value).splitlines()[-1].strip() == f"- {hint}"


def test_a_key_in_a_map_of_tables_names_what_it_may_be_meant_for(tmp_path: Path) -> None:
    path = written(tmp_path, "market: kr\ninputs: {catalog: {path: x, formats: csv}}")
    with pytest.raises(ConfigError, match=r"inputs\.catalog\.formats: .*Is it format\?"):
        load_config(path, ExampleConfig)


def test_resolved_settings_say_where_each_comes_from(tmp_path: Path) -> None:
    path = written(tmp_path, "market: 台灣\ninputs: {catalog: {path: x, columns: {title: name}}}")
    overrides = ["learning_rate=0.5", "inputs.catalog.format=csv"]
    config = load_config(path, ExampleConfig, overrides)

    assert resolved_settings(config, str(path), overrides) == [
        ("market", '"台灣"', str(path)),
        ("learning_rate", "0.5", "--set"),
        ("inputs.catalog.path", '"x"', str(path)),
        ("inputs.catalog.format", '"csv"', "--set"),
        ("inputs.catalog.columns.title", '"name"', str(path)),
        ("inputs.catalog.market", "null", "default"),
        ("inputs.catalog.options", "{}", "default"),
    ]


def test_show_config_prints_the_settings_and_does_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONF.parent)
    with pytest.raises(SystemExit) as ended:
        score_catalog.main(["--set", "bundle=s3a://KEY:SECRET@bucket/b", "--show-config"])

    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'bundle: "s3a://***@bucket/b"  # --set' in lines
    assert 'markets.kr: "ko"  # conf/score_catalog.yaml' in lines
    assert "hang_minutes: 30.0  # default" in lines
    assert "audit.deleted_share.limit: 0.2  # conf/score_catalog.yaml" in lines


@pytest.mark.parametrize("name", ["delta", "Delta", "PARQUET"])
def test_known_formats_have_one_name(name: str) -> None:
    assert InputSpec(path="p", format=name).format == name.lower()
    assert InputSpec(path="p", format="org.example.Reader").format == "org.example.Reader"


def test_an_output_that_is_no_folder_of_this_machine_is_refused_before_the_work(tmp_path: Path) -> None:
    values = {"markets": {"tw": "zh-TW"}, "inputs": {"catalog": {"path": "c"}, "queries": {"path": "q"}}, "tables": "t"}
    with pytest.raises(ValidationError, match=r"is a URI; expected a folder of this machine"):
        report.ReportConfig.model_validate({**values, "output": "s3a://bucket/reports"})
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"output '.*reports': cannot be made \(Not a directory: .*Name another folder"
    ):
        make_folder(str(tmp_path / "file" / "reports"))


SHARED = """
markets: {kr: ko, tw: zh-TW}
tables: /data/tables
device: null
inputs:
  catalog: {path: c.parquet, format: parquet, columns: {title: name}}
  queries: {path: q.parquet, format: parquet}
  behaviour: {path: b.parquet, format: parquet}
"""


def with_shared(folder: Path, text: str, shared: str = SHARED) -> str:
    (folder / "market.yaml").write_text(shared, encoding="utf-8")
    return str(written(folder, text))


def test_a_job_takes_the_shared_settings_that_it_has(tmp_path: Path) -> None:
    path = with_shared(tmp_path, "extends: market.yaml\noutput: pages")
    config = load_config(path, report.ReportConfig)
    assert config.markets == {"kr": "ko", "tw": "zh-TW"}
    assert config.tables == "/data/tables"
    assert config.inputs.catalog.columns == {"title": "name"}
    sources = {key: source for key, _, source in resolved_settings(config, path)}
    assert sources["markets.kr"] == sources["inputs.queries.path"] == str(tmp_path / "market.yaml")
    assert (sources["output"], sources["num_runs"]) == (path, "default")


def test_a_setting_of_the_job_replaces_the_shared_one_and_so_does_a_table(tmp_path: Path) -> None:
    text = "extends: market.yaml\noutput: pages\nmarkets: {us: en}\ninputs: {queries: {path: mine}}"
    path = with_shared(tmp_path, text)
    overrides = ["tables=elsewhere"]
    config = load_config(path, report.ReportConfig, overrides)
    assert config.markets == {"us": "en"}
    assert (config.inputs.queries.path, config.inputs.queries.format) == ("mine", "delta")
    assert (config.inputs.catalog.path, config.tables) == ("c.parquet", "elsewhere")
    sources = {key: source for key, _, source in resolved_settings(config, path, overrides)}
    assert (sources["markets.us"], sources["inputs.queries.path"], sources["tables"]) == (path, path, "--set")


def test_an_optional_table_is_left_out_by_null(tmp_path: Path) -> None:
    shared = SHARED.replace("behaviour:", "judgments:")
    given = load_config(with_shared(tmp_path, "extends: market.yaml\nbundle: b", shared), ScoringConfig)
    left_out = load_config(
        with_shared(tmp_path, "extends: market.yaml\nbundle: b\ninputs: {judgments: null}", shared), ScoringConfig
    )
    assert given.inputs.judgments == InputSpec(path="b.parquet", format="parquet")
    assert left_out.inputs.judgments is None


@pytest.mark.parametrize(
    ("text", "shared", "message"),
    [
        ("extends: market.yml", SHARED, r"config '.*market\.yml': cannot be read"),
        ("extends: 7", SHARED, r"extends: expected the name of a file beside it, got 7"),
        ("extends: market.yaml", "tabel: x", r"config '.*market\.yaml': 1 problem:\n.*tabel: .*Is it tables\?"),
        ("extends: market.yaml", "inputs: {catalogue: {path: x}}", r"inputs\.catalogue: .*Is it catalog\?"),
        (
            "extends: market.yaml",
            "inputs: {candidates: {path: x}}",
            r"candidates would replace those",
        ),
        ("extends: market.yaml", "- a", r"market\.yaml': expected a mapping"),
        ("extends: market.yaml\ninputs: 3", SHARED, r"inputs: .*\(got 3\)"),
    ],
)
def test_what_is_wrong_with_a_shared_file_is_named(tmp_path: Path, text: str, shared: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(with_shared(tmp_path, text, shared), report.ReportConfig)
