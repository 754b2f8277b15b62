"""The demo itself, at a small size."""

from pathlib import Path

import deltalake
import pandas as pd
import pytest
import yaml

from csrm.commands import demo

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def test_the_demo_publishes_evaluates_and_scores_the_next_nights_changes_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spark: object
) -> None:
    config = tmp_path / "demo.yaml"
    settings = yaml.safe_load(Path("conf/demo.yaml").read_text())
    config.write_text(
        yaml.safe_dump({**settings, "work": str(tmp_path), "products_per_market": 60, "queries_per_market": 9})
    )
    assert demo.main(["--config", str(config)]) == 0
    first = deltalake.DeltaTable(str(tmp_path / "tables" / "relevance_scores"))
    printed = capsys.readouterr().out
    assert "published run" in printed
    assert printed.count("  best  ") == 9
    assert set(first.to_pandas()["market"]) == {"kr", "tw", "us"}
    assert (tmp_path / "evaluation" / "evaluation.html").stat().st_size > 10_000

    catalog, renamed = (
        pd.read_parquet(tmp_path / "inputs" / f"{name}.parquet") for name in ("catalog", "catalog_next_night")
    )
    changed = catalog[catalog["title"] != renamed["title"]]
    scores = first.to_pandas().merge(changed[["market", "product_id"]])
    assert 0 < scores["market"].nunique() == printed.count("update_postimage")
    runs = deltalake.DeltaTable(str(tmp_path / "tables" / "scoring_runs")).to_pandas().sort_values("started_at")
    assert runs["num_unchanged"].tolist()[1] > 0.9 * runs["num_candidates"].tolist()[1]
