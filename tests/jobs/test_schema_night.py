"""Nights, and all that follows them, by the name of a schema of a Hive metastore, each step in processes of its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csrm.cli import setting_arguments
from csrm.commands import generate_market
from tests.metastore import ROOT, Metastore, ended, hive_metastore

pytestmark = [pytest.mark.spark, pytest.mark.long, pytest.mark.timeout(2000)]
TABLES = "schema:csrm"
MARKETS = {"us": "en", "kr": "ko"}
OWN = ["candidates", "relevance_scores", "retrieval_table", "run_pairs", "scores_staging", "scoring_runs"]
NO_TITLES = {"use_retrieved_titles": False}


@pytest.fixture(scope="module")
def metastore(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Metastore]:
    with hive_metastore(tmp_path_factory.mktemp("metastore")) as running:
        yield running


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the inputs of two small markets."""
    folder: Path = tmp_path_factory.mktemp("market")
    words = setting_arguments(output=str(folder), markets=MARKETS, products_per_market=40, queries_per_market=8)
    assert generate_market.main(words) == 0
    return folder


def job(command: str, market: Path, *inputs: str, words: tuple[str, ...] = (), **settings: Any) -> list[str]:
    """Words of a command on the market's inputs, with its file of conf."""
    specs = {name: {"path": str(market / f"{name}.parquet"), "format": "parquet"} for name in inputs}
    given = {**({} if command == "compare" else {"tables": TABLES}), **settings}
    if inputs:
        given["inputs"] = specs | settings.get("inputs", {})
    config = ROOT / "conf" / f"{command.replace('-', '_')}.yaml"
    return [command, "--config", str(config), *setting_arguments(**given), *words]


def score(market: Path, run_id: str, **settings: Any) -> list[str]:
    given = {"markets": MARKETS, "bundle": str(ROOT / "conf" / "demo_bundle"), "canary_pairs": 2, **settings}
    return job("score-catalog", market, "catalog", "queries", words=("--run-id", run_id), **given)


def test_nights_and_all_that_follows_go_by_the_name_of_a_schema(
    metastore: Metastore, market: Path, tmp_path: Path
) -> None:
    texts = ("catalog", "queries")
    first, printed = metastore.run(
        [
            "CREATE SCHEMA csrm",
            job("build-retrieval-table", market, *texts, markets=MARKETS),
            job("build-candidates", market, *texts, markets=MARKETS),
            score(market, "r1"),
        ]
    )
    assert first == [[], 0, 0, 0], printed
    folder = metastore.warehouse / "csrm.db"
    assert (folder / "relevance_scores" / "_delta_log").is_dir()

    # another process reads by name; then a person drops the name, and the next night has other titles
    scores = "SELECT market, count(*) > 0 FROM csrm.relevance_scores GROUP BY market ORDER BY market"
    catalog = pq.read_table(market / "catalog.parquet")
    titles = [title and f"{title} 2" for title in catalog["title"].to_pylist()]
    catalog = catalog.set_column(catalog.schema.get_field_index("title"), "title", pa.array(titles))
    pq.write_table(catalog, market / "catalog.parquet")
    warning = {"limit": 0.0001, "severity": "warning"}
    audit = {"fewest_pairs": 1, "changed_ks": 0.0001, "changed_psi": warning, "grade_shift": warning}
    results, printed = metastore.run(
        [
            scores,
            "DROP TABLE csrm.relevance_scores",
            score(market, "r2", audit=audit),
            scores,
            "SELECT DISTINCT run_id FROM csrm.relevance_scores",
            job("publish", market, words=("--run-id", "r2", "--accept", "drift.changed_ks", "--reason", "new titles")),
            "SELECT DISTINCT run_id FROM csrm.relevance_scores",
        ]
    )
    both = [["kr", True], ["us", True]]
    assert results == [both, [], 3, both, [["r1"]], 0, [["r2"]]], printed

    columns = {"score": "relevance_score", "grade": "predicted_grade"}
    named = {"path": "csrm.relevance_scores", "format": "table", "columns": columns}
    query, output = ("--market", "us", "--query-id", "q000000"), {"output": str(tmp_path / "out")}
    results, printed = metastore.run(
        [
            job("report", market, *texts, markets=MARKETS, **output),
            job("evaluate", market, *texts, "judgments", markets=MARKETS, **output),
            job("explain", market, *texts, markets=MARKETS, words=query, **output),
            job("launch-report", market, *texts, markets={"kr": "ko"}, live_markets={}, **output),
            job("rollback", market, words=("--market", "us", "--to-run", "r1")),
            job("compare", market, *texts, markets=MARKETS, before=named, after=named, **output),
            job("maintain", market),
            job("migrate", market),
            ["doctor", "--config", str(ROOT / "conf" / "score_catalog.yaml"), *setting_arguments(tables=TABLES)],
            job("retire", market, words=("--market", "kr", "--reason", "closed")),
            "SELECT DISTINCT market, run_id FROM csrm.relevance_scores",
            "SHOW TABLES IN csrm",
        ]
    )
    assert results[:-1] == [0] * 10 + [[["us", "r1"]]], printed
    assert {name for _, name, _ in results[-1]} == {*OWN, "uncovered_products", "launch_findings"}
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"r2.html", "evaluation.html", "launch-kr.html"}


def test_two_nights_at_once_make_the_tables_of_a_new_schema_and_publish_their_markets(
    metastore: Metastore, market: Path
) -> None:
    assert metastore.run(["CREATE SCHEMA csrm2"])[0] == [[]]
    candidates = {"candidates": {"path": str(market / "candidates.parquet"), "format": "parquet"}}
    nights = [
        metastore.start(
            [score(market, name, tables="schema:csrm2", markets={name: language}, **NO_TITLES, inputs=candidates)]
        )
        for name, language in MARKETS.items()
    ]
    for results, printed in map(ended, nights):
        assert results == [0], printed

    results, printed = metastore.run(["SELECT DISTINCT market FROM csrm2.relevance_scores ORDER BY market"])
    assert results == [[["kr"], ["us"]]], printed
