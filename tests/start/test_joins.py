from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from csrm.errors import InputError
from csrm.start.joins import check_references
from csrm.start.tables import FoundTable, open_found


def opened(folder: Path, name: str, **columns: object) -> tuple[FoundTable, dict[str, str]]:
    pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return open_found(str(folder / f"{name}.parquet"), name), {column: column for column in columns}


def test_ids_that_are_nowhere_tell_that_a_column_was_taken_for_another(tmp_path: Path) -> None:
    """A row's own number would else be taken for a query's id, and graded pairs for those of other queries."""
    tables = {
        "queries": opened(tmp_path, "queries", market=["us"] * 3, query_id=[1, 2, 3]),
        "catalog": opened(tmp_path, "catalog", market=["us"] * 2, product_id=["p1", "p2"]),
        "judgments": opened(tmp_path, "judgments", market=["us"] * 3, query_id=[77, 78, 1], product_id=["p1"] * 3),
    }
    message = (
        r"judgments: 2 of 3 ids that were looked at in column 'query_id', taken for query_id, are not in column "
        r"'query_id' of queries, for example '77' of market 'us'\. Say which column it is: --column judgments.query_id="
    )
    with pytest.raises(InputError, match=message):
        check_references(tables)


def test_a_few_ids_that_are_gone_are_noted(tmp_path: Path) -> None:
    tables = {
        "catalog": opened(tmp_path, "catalog", market=["us"] * 3, product_id=["p1", "p2", "p3"]),
        "behaviour": opened(tmp_path, "behaviour", market=["us"] * 4, product_id=["p1", "p2", "p3", "p9"]),
    }
    (note,) = check_references(tables)
    assert note.startswith("behaviour: 1 of 4 ids")
    assert "for example 'p9' of market 'us'. Nights reject such pairs, and training refuses them" in note


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([7, 8], pa.int64()),
        pa.array([7.0, 8.0], pa.float64()),
        pa.array([Decimal("7.00"), Decimal("8.00")], pa.decimal128(10, 2)),
        pa.array(["7", "8"], pa.large_string()),
        pa.array(["7", "8"]).dictionary_encode(),
    ],
)
def test_ids_of_other_types_meet_as_they_do_in_jobs(tmp_path: Path, ids: pa.Array) -> None:
    tables = {
        "catalog": opened(tmp_path, "catalog", market=["us", "us"], product_id=ids),
        "candidates": opened(tmp_path, "candidates", market=["us", "us"], product_id=["7", "8"], query_id=["1", "1"]),
    }
    assert check_references(tables) == []


def test_ids_of_another_market_are_not_there(tmp_path: Path) -> None:
    tables = {
        "catalog": opened(tmp_path, "catalog", market=["us", "kr"], product_id=["p1", "p2"]),
        "behaviour": opened(tmp_path, "behaviour", market=["us", "tw"], product_id=["p2", "p1"]),
    }
    with pytest.raises(InputError, match=r"behaviour: 1 of 1 ids .* for example 'p2' of market 'us'"):
        check_references(tables)
