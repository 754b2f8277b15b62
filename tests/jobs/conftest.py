"""Fixtures that tests of more than one job use."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest


@pytest.fixture(scope="session")
def market_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a training that name a generated market of three countries, and a tiny base model for its texts."""
    from csrm.cli import setting_arguments
    from csrm.commands import generate_market
    from csrm.training.model.tiny import train_byte_tokenizer, write_tiny_base_model

    folder: Path = tmp_path_factory.mktemp("market")
    generate_market.main(
        setting_arguments(output=str(folder / "inputs"), products_per_market=80, queries_per_market=12)
    )
    titles = pd.read_parquet(folder / "inputs" / "catalog.parquet")["title"].dropna()
    base_model = write_tiny_base_model(folder / "base", train_byte_tokenizer(titles, 800))
    return {
        "markets": {"kr": "ko", "tw": "zh-TW", "us": "en"},
        "inputs": {
            name: {"path": str(folder / "inputs" / f"{name}.parquet"), "format": "parquet"}
            for name in ("catalog", "queries", "judgments")
        },
        "base_model": {"folder": str(base_model)},
    }
