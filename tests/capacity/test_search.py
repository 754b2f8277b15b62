"""How long search by meaning takes: the formula, and the command that shows it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from csrm.capacity.formula import Machines
from csrm.capacity.search import BYTES_PER_ROW, SearchPlan, encoder_rate
from csrm.cli import run_job
from csrm.commands.capacity import main
from csrm.retrieval import nearest

DEMO_BUNDLE = Path(__file__).parents[2] / "conf" / "demo_bundle"
WORDS = ["--queries", "1000000", "--products-per-query", "100", "--bundle", str(DEMO_BUNDLE)]
SEARCH = ["--products", "10000000", "--tokens-per-second", "20000", "--cores", "100"]


def test_a_search_worked_by_hand() -> None:
    """Two markets of 1 M products and 50,000 queries each, vectors of 192 numbers, a tenth of the texts new."""
    plan = SearchPlan(192, 500.0, Machines(slots=4, cores=100), share_new=0.1, num_markets=2, queries_per_product=3)
    needs = plan.needs(2_000_000, 100_000)
    assert needs.embed_s == pytest.approx(0.1 * 2_100_000 / 500 / 4)
    assert needs.search_s == pytest.approx(2 * (1_000_000 * 50_000) / (100e6 * 100))
    assert needs.num_chunks == 2
    assert needs.broadcast_bytes == 50_000 * 192 * 4
    assert needs.read_bytes == (2 * 2_000_000 + 100_000) * 192 * 4
    assert needs.table_bytes == 2_100_000 * 192 * 4
    assert needs.shuffled_bytes == (100 * 100_000 * 50 + 2 * 2_000_000 * 3) * BYTES_PER_ROW


def test_a_broadcast_is_as_large_as_the_queries_of_a_chunk_are() -> None:
    plan = SearchPlan(384, 1.0, Machines(1, 1))
    assert plan.needs(10, 1_000).broadcast_bytes == 1_000 * 384 * 4
    assert plan.needs(10, 10**6).broadcast_bytes == plan.needs(10, 10**5).broadcast_bytes == 76_800_000
    vectors = pa.array(np.zeros((10, 384), np.float32).tolist(), pa.list_(pa.float32()))
    table = {"market": ["us"] * 10, "query_id": [*map(str, range(10))], "vector": pa.compute.add(vectors.flatten(), 1)}
    table["vector"] = pa.ListArray.from_arrays(pa.array(range(0, 3841, 384), pa.int32()), table["vector"])
    found = nearest._by_market(pa.table(table))["us"]
    assert found.matrix.nbytes == plan.needs(1, 10).broadcast_bytes


def test_the_command_shows_the_search_beside_larger_ones(
    tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*WORDS, *SEARCH, "--encoder", str(tiny_encoder), "--texts-per-second", "1000"]) == 0
    shown = capsys.readouterr().out
    assert "32 dimensions; 1,000 texts/s on each of 100 cores (from --texts-per-second); 100 cores compare" in shown
    lines = {line[:24].strip(): line[24:].split() for line in shown.partition("Search by meaning")[2].splitlines()}
    # 1.1e7 texts; 1e13 pairs of 32 numbers, which go 12 times as fast as those of 384
    assert lines["hours, embedding"] == ["0.031", "0.003", "0.031"]
    assert lines["hours, search"] == ["0.046", "0.000", "0.046"]
    assert lines["core-hours, search"][0] == "4.63"
    assert lines["broadcast at once"][:2] == ["6.4", "MB"]


def test_the_rate_of_an_encoder_is_measured(tiny_encoder: Path) -> None:
    assert 0 < encoder_rate(str(tiny_encoder)) < float("inf")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--products", "10"], "--products and --encoder go together"),
        (["--products", "10", "--encoder", "x", "--gpus", "2"], "the encoder's rate on one GPU"),
        (["--products", "10", "--encoder", "x", "--new-texts", "1.5"], "as is --new-texts"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(main, [*WORDS, *words]) == 2
    assert problem in capsys.readouterr().err
