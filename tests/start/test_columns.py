from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from csrm.schemas import BEHAVIOUR, CATALOG, JUDGMENTS, QUERIES, Table
from csrm.start.columns import ColumnProposal, propose_columns
from csrm.start.tables import open_found


def proposed(folder: Path, table: Table, columns: dict[str, list[object]], **chosen: str) -> ColumnProposal:
    path = folder / "table.parquet"
    pq.write_table(pa.table(columns), path)
    return propose_columns(table, open_found(str(path), table.name), chosen)


def test_columns_of_the_same_name_need_no_entry(tmp_path: Path) -> None:
    columns = {"market": ["us"], "product_id": ["p"], "title": ["t"], "brand": ["b"], "price": [1.0]}
    proposal = proposed(tmp_path, CATALOG, columns)
    assert (proposal.columns, proposal.problems) == ({}, ())


def test_other_cases_usual_names_and_misspelt_ones_are_found(tmp_path: Path) -> None:
    columns = {"MARKET": ["us"], "sku": ["p"], "productTitle": ["t"], "brand_name": ["b"]}
    proposal = proposed(tmp_path, CATALOG, columns)
    assert proposal.columns == {"market": "MARKET", "product_id": "sku", "title": "productTitle", "brand": "brand_name"}
    proposal = proposed(tmp_path, JUDGMENTS, {"markt": ["us"], "query_id": [1], "product_id": [2], "esci_label": ["E"]})
    assert proposal.columns == {"market": "markt", "grade": "esci_label"}


def test_a_name_of_one_table_stands_for_nothing_in_another(tmp_path: Path) -> None:
    columns = {"market": ["us"], "query_id": [1], "query": ["q"], "count": [3]}
    assert proposed(tmp_path, QUERIES, columns).columns == {"frequency": "count"}
    columns = {"market": ["us"], "query": ["q"], "product_id": [1], "clicks": [3]}
    assert proposed(tmp_path, BEHAVIOUR, columns).columns == {"count": "clicks"}


def test_a_column_stands_for_one_of_csrms_only(tmp_path: Path) -> None:
    columns = {"locale": ["us"], "id": ["p"], "name": ["t"]}
    proposal = proposed(tmp_path, CATALOG, columns)
    assert proposal.columns == {"market": "locale", "product_id": "id", "title": "name"}


def test_the_number_of_a_pairs_row_is_no_id_of_its_query_or_product(tmp_path: Path) -> None:
    columns = {"market": ["us"], "id": [1], "query_id": [1], "asin": ["p"], "grade": ["E"]}
    assert proposed(tmp_path, JUDGMENTS, columns).columns == {"product_id": "asin"}
    del columns["query_id"]
    (problem,) = proposed(tmp_path, JUDGMENTS, columns).problems
    assert "no column stands for query_id" in problem


def test_types_tell_what_a_column_cannot_be(tmp_path: Path) -> None:
    keys: dict[str, list[object]] = {"market": ["us"], "product_id": ["p"], "title": ["t"]}
    assert proposed(tmp_path, CATALOG, {**keys, "attributes": ["red, blue"]}).columns == {"attributes": None}
    assert proposed(tmp_path, CATALOG, {**keys, "attributes": ['{"color": "red"}']}).columns == {}
    assert proposed(tmp_path, CATALOG, {**keys, "features": [["a", "b"]]}).columns == {}
    assert proposed(tmp_path, CATALOG, {**keys, "specs": [{"color": "red"}]}).columns == {"attributes": "specs"}


def test_a_needed_column_without_a_candidate_is_named_with_the_way_out(tmp_path: Path) -> None:
    proposal = proposed(tmp_path, QUERIES, {"query_id": [1], "words": ["q"]})
    assert [problem.partition(":")[2] for problem in proposal.problems] == [
        " no column stands for market (Storefront, for example tw); it has ['query_id', 'words']. Say which one: "
        "--column queries.market=NAME, or of which market all rows are, with its language: --language MARKET=CODE, "
        "once",
        " no column stands for query (Query text as typed); it has ['query_id', 'words']. Say which one: "
        "--column queries.query=NAME",
    ]


def test_what_a_person_said_goes_first_and_is_checked(tmp_path: Path) -> None:
    columns = {"market": ["us"], "query_id": [1], "query": ["q"], "words": ["w"]}
    assert proposed(tmp_path, QUERIES, columns, query="words").columns == {"query": "words"}
    (problem,) = proposed(tmp_path, QUERIES, columns, query="wordz").problems
    assert "--column queries.query=wordz: there is no column 'wordz'; it has ['market'," in problem
    (problem,) = proposed(tmp_path, QUERIES, columns, text="words").problems
    assert "--column queries.text: expected one of ['market', 'query_id'," in problem


def test_a_column_whose_name_is_like_one_of_csrms_can_be_left_out(tmp_path: Path) -> None:
    columns: dict[str, list[object]] = {"sku": ["p"], "title": ["t"], "marke": ["Oltek"], "country": ["CN"]}
    proposal = proposed(tmp_path, CATALOG, columns)  # Marke is German for brand; the country may be the product's
    assert (proposal.there["brand"], proposal.there["market"]) == ("marke", "country")
    (problem,) = proposed(tmp_path, CATALOG, columns, market="null").problems
    assert "no column stands for market" in problem
    assert proposed(tmp_path, CATALOG, {**columns, "market": ["us"]}, brand="null").columns == {
        "product_id": "sku",
        "brand": None,
    }
