"""The scoring job as its users start it: real spark-submit, exit codes, what it prints and publishes."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pyspark
import pytest
import yaml

from csrm.commands.score_catalog import main
from csrm.config import load_config
from csrm.errors import AuditError, BundleError, ConfigError
from csrm.night.settings import ScoringConfig

deltalake = pytest.importorskip("deltalake")

ROOT = Path(__file__).parents[2]
DELTA_IN_JARS = any((Path(pyspark.__file__).parent / "jars").glob("delta-spark*.jar"))


def submit(config: Path, *arguments: str, with_delta: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the job; spark-submit prints what it wrote on stdout and stderr on its stdout."""
    spark_line = ".".join(pyspark.__version__.split(".")[:2])
    packages = ["--packages", f"io.delta:delta-spark_{spark_line}_2.13:{version('delta-spark')}"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    for name in ("SPARK_HOME", "PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET", "PYSPARK_SUBMIT_ARGS"):
        environment.pop(name, None)
    command = [str(Path(sys.executable).parent / "spark-submit"), "--master", "local[2]"]
    command += packages if with_delta and not DELTA_IN_JARS else []
    command += [str(ROOT / "jobs" / "score_catalog.py"), "--config", str(config), *arguments]
    return subprocess.run(command, cwd=config.parent, env=environment, capture_output=True, text=True, check=False)


def write_inputs(folder: Path) -> None:
    """Two markets; of eight candidates, one has no product."""
    products = [("kr", f"p{n}", title) for n, title in enumerate(["캠핑 텐트", "수건", "등산화"])]
    products += [("tw", f"p{n}", title) for n, title in enumerate(["露營帳篷", "毛巾"])]
    catalog = pd.DataFrame(products, columns=["market", "product_id", "title"])
    queries = pd.DataFrame(
        [("kr", "q1", "텐트"), ("kr", "q2", "신발"), ("tw", "q1", "帳篷")], columns=["market", "query_id", "query"]
    )
    pairs = [("kr", query, f"p{n}") for query in ("q1", "q2") for n in range(3)] + [
        ("tw", "q1", "p0"),
        ("tw", "q1", "p9"),
    ]
    retrieved = [("kr", "q1", 1, "p0", "캠핑 텐트", 1.0, "lexical")]
    names = ["market", "query_id", "rank", "product_id", "title", "similarity", "source"]
    catalog.to_parquet(folder / "catalog.parquet")
    queries.to_parquet(folder / "queries.parquet")
    pd.DataFrame(pairs, columns=["market", "query_id", "product_id"]).to_parquet(folder / "candidates.parquet")
    pd.DataFrame(retrieved, columns=names).astype({"rank": "int32"}).to_parquet(folder / "retrieval_table.parquet")


@pytest.fixture(scope="module")
def config(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose inputs are all there."""
    folder = tmp_path_factory.mktemp("score_catalog")
    write_inputs(folder)
    inputs = ("catalog", "queries", "candidates", "retrieval_table")
    values = {
        "markets": {"kr": "ko", "tw": "zh-TW"},
        "inputs": {name: {"path": str(folder / f"{name}.parquet"), "format": "parquet"} for name in inputs},
        "tables": str(folder / "tables"),
        "bundle": str(tiny_bundle),
        "audit": {"rejected_share": 0.5},
    }
    path = folder / "score_catalog.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def published(config: Path) -> deltalake.DeltaTable:
    return deltalake.DeltaTable(str(config.parent / "tables" / "relevance_scores"))


def test_the_default_configuration_loads() -> None:
    config = load_config(ROOT / "conf" / "score_catalog.yaml", ScoringConfig)

    assert config.device == "cpu"


@pytest.mark.spark
@pytest.mark.slow
def test_a_run_publishes_once_and_an_audit_that_fails_publishes_nothing(
    spark: object, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = submit(config, "--run-id", "2026-01-02", "--data-date", "2026-01-02")

    assert first.returncode == 0, first.stdout
    lines = first.stdout.splitlines()
    assert lines[0].startswith("warning: retrieval_table has no titles for the markets ['tw']: ")
    assert lines[1].startswith(
        "run 2026-01-02: 8 candidate pairs of kr, tw: 0 unchanged, 7 to score in about 1 s after the start, "
        "if as fast as at the export; bundle "
    )
    assert lines[1].endswith("(fp32) on cpu (CPUExecutionProvider)")
    assert "rejected 1 pairs: 1 no_product" in lines
    assert "published run 2026-01-02: relevance_scores version 2" in lines
    rows = published(config).to_pyarrow_table().to_pylist()
    assert sorted((row["market"], row["query_id"], row["product_id"]) for row in rows) == [
        *(("kr", query, f"p{n}") for query in ("q1", "q2") for n in range(3)),
        ("tw", "q1", "p0"),
    ]
    assert all(0 <= row["relevance_score"] <= 1 for row in rows)
    run = deltalake.DeltaTable(str(config.parent / "tables" / "scoring_runs")).to_pyarrow_table().to_pylist()[0]
    assert (run["num_candidates"], run["num_scored"], run["rejected"]) == (8, 7, [("no_product", 1)])
    assert (run["verdict"], run["base_version"], run["published_version"]) == ("published", 0, 2)

    arguments = ["--config", str(config), "--run-id", "2026-01-02"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "run 2026-01-02 was published before: relevance_scores version 2.\n"
    with pytest.raises(ConfigError, match=r"Choose another --run-id\."):
        main([*arguments, "--set", "markets={kr: ko}"])

    refused = submit(config, "--run-id", "2026-01-04", "--set", "audit.rejected_share=0.1")
    assert refused.returncode == 3, refused.stdout
    assert "tw: rejected_share: 0.5, expected <= 0.1. 1 of 2 candidate pairs cannot be scored." in refused.stdout
    with pytest.raises(ConfigError, match=r"is rejected: it has the markets .* Choose another --run-id\."):
        main(["--config", str(config), "--run-id", "2026-01-04", "--set", "markets={kr: ko}"])
    assert published(config).version() == 2


@pytest.mark.spark
@pytest.mark.slow
def test_a_small_market_that_fails_its_audit_publishes_and_deletes_nothing(
    spark: object, config: Path, tmp_path: Path
) -> None:
    folder = config.parent
    candidates = pd.read_parquet(folder / "candidates.parquet").query("product_id != 'p9'")
    candidates.to_parquet(tmp_path / "candidates.parquet")
    catalog = pd.read_parquet(folder / "catalog.parquet")
    catalog[(catalog["market"] == "kr") | (catalog["product_id"] != "p0")].to_parquet(tmp_path / "catalog.parquet")
    arguments = ["--config", str(config), "--set", "audit.rejected_share=0.2", "--set", f"tables={tmp_path}/tables"]
    arguments += ["--set", f"inputs.candidates.path={tmp_path}/candidates.parquet"]
    scores = tmp_path / "tables" / "relevance_scores"
    assert main([*arguments, "--run-id", "first"]) == 0
    before = deltalake.DeltaTable(str(scores))

    with pytest.raises(AuditError) as caught:
        main([*arguments, "--run-id", "second", "--set", f"inputs.catalog.path={tmp_path}/catalog.parquet"])

    assert "  - tw: not_empty: 0, expected >= 1. 0 pairs have a score." in str(caught.value).splitlines()
    assert "  - kr:" not in str(caught.value)
    after = deltalake.DeltaTable(str(scores))
    assert after.version() == before.version()
    assert after.to_pyarrow_table()["market"].to_pylist().count("tw") == 1
    runs = deltalake.DeltaTable(str(tmp_path / "tables" / "scoring_runs")).to_pyarrow_table().to_pylist()
    assert {run["run_id"]: (run["num_scored"], run["num_unchanged"], run["rejected"]) for run in runs} == {
        "first": (7, 0, []),
        "second": (0, 6, [("no_product", 1)]),
    }
    assert {run["run_id"]: run["verdict"] for run in runs} == {"first": "published", "second": "rejected"}


@pytest.mark.spark
@pytest.mark.slow
def test_bad_input_exits_with_2_and_every_problem(config: Path, tmp_path: Path) -> None:
    queries = pd.DataFrame([("kr", "q1", "텐트"), ("kr", "q1", "신발")], columns=["market", "query_id", "query"])
    queries.to_parquet(tmp_path / "queries.parquet")

    failed = submit(
        config, "--set", f"inputs.queries.path={tmp_path}/queries.parquet", "--set", "inputs.catalog.path=/nothing"
    )

    assert failed.returncode == 2
    assert "input catalog at '/nothing'" in failed.stdout
    assert "1 keys (market, query_id) are not unique" in failed.stdout
    assert "Traceback" not in failed.stdout


@pytest.mark.spark
@pytest.mark.slow
def test_a_missing_device_exits_with_4(config: Path) -> None:
    failed = submit(config, "--set", "device=cuda:9")

    assert failed.returncode == 4
    assert "error: device 'cuda:9'" in failed.stdout


@pytest.mark.spark
@pytest.mark.slow
def test_a_bad_configuration_exits_with_2_before_spark_starts(config: Path) -> None:
    failed = submit(config, "--set", "devise=cpu")

    assert failed.returncode == 2
    assert "devise: Extra inputs are not permitted" in failed.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run-id", "../x y"], r"--run-id '\.\./x y': expected at most 100 letters, digits"),
        (
            ["--run-id", ".."],
            r"--run-id '\.\.': expected at most 100 letters, digits and \. : _ - only, none of \. : - ",
        ),
        (["--run-id", "r" * 101], r"--run-id 'r{101}': expected at most 100 letters, digits and"),
        (["--data-date", "01.02.2026"], r"--data-date '01\.02\.2026': expected YYYY-MM-DD\."),
    ],
)
def test_bad_arguments_are_refused_before_spark_starts(config: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--config", str(config), *arguments])


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.skipif(DELTA_IN_JARS, reason="Delta is in Spark's own jars folder")
def test_spark_submit_without_delta_names_the_flag(config: Path) -> None:
    failed = submit(config, with_delta=False)

    assert failed.returncode == 2
    assert f"--packages io.delta:delta-spark_4.2_2.13:{version('delta-spark')}" in failed.stdout


def test_another_bundle_than_the_pinned_one_is_refused_before_spark_starts(config: Path) -> None:
    with pytest.raises(BundleError, match=r"expected digest 0123456789ab, got [0-9a-f]{64}\. Put the bundle there"):
        main(["--config", str(config), "--set", "bundle_digest='0123456789ab'"])
