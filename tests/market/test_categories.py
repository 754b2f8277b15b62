import gzip
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from csrm.errors import InputError
from csrm.market.categories import CategoryMarkets, Storefront, category_markets
from csrm.text import search_terms

KOREAN = "각낙닥락막박삭악"
FRONTS = [Storefront("kr", "ko"), Storefront("us", "en", listed_language="ko")]


def _tables(num_branches: int) -> Iterator[tuple[str, list[list[str]]]]:
    """A root with branches of three leaves each; the names of the two languages share nothing."""
    splits = ["train", "train", "dev", "test"]
    categories = [["id", "parent_id", "split", "en", "ko"], ["r", "", "train", "All", "전체"]]
    for branch in range(num_branches):
        split = splits[branch % 4]
        categories.append([f"r-{branch}", "r", split, f"Branch{branch}", f"가지{KOREAN[branch]}"])
        categories += [
            [f"r-{branch}-{leaf}", f"r-{branch}", split, f"Leaf{branch}x{leaf}", f"잎{KOREAN[leaf]}{KOREAN[branch]}"]
            for leaf in range(3)
        ]
    yield "categories", categories
    yield "values", [["id", "attribute_id", "en", "split", "ko"], *_values()]
    yield "attributes", [["split", "en_description", "ko_description"], ["train", "Says the colour.", "색을 말합니다."]]
    yield "category_attributes", [["category_id", "attribute_id"], *([row[0], "color"] for row in categories[1:])]


def _values() -> list[list[str]]:
    return [["c1", "color", "Red", "train", "빨강"], ["c2", "color", "Blue", "test", "파랑"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("taxonomy")
    for name, rows in _tables(8):
        text = "\n".join("\t".join(row) for row in rows)
        (path / f"{name}.tsv.gz").write_bytes(gzip.compress(text.encode()))
    return path


@pytest.fixture(scope="module")
def made(folder: Path) -> CategoryMarkets:
    return category_markets(folder, FRONTS, ["ko", "en"])


@pytest.fixture(scope="module")
def judged(made: CategoryMarkets) -> pd.DataFrame:
    queries = made.queries[["market", "query_id", "query"]]
    products = made.catalog[["market", "product_id", "title", "language"]]
    return made.judgments.merge(queries).merge(products)


def test_what_is_relevant_follows_from_the_tree(judged: pd.DataFrame) -> None:
    is_below = [row.product_id.startswith(f"{row.query_id}-") for row in judged.itertuples()]
    assert list(judged["grade"] == "yes") == is_below
    assert judged.groupby(["market", "query_id"])["grade"].nunique().eq(2).all()


def test_query_product_and_pair_are_of_one_split(judged: pd.DataFrame) -> None:
    splits = {row[0]: row[2] for row in next(_tables(8))[1][1:]}
    assert all(row.split == splits[row.query_id] for row in judged.itertuples())
    assert all(row.split == splits[row.product_id.partition("_")[0]] for row in judged.itertuples())
    assert set(judged["split"]) == {"train", "dev", "test"}


def test_the_texts_of_a_judged_pair_share_no_term(judged: pd.DataFrame) -> None:
    assert not judged.empty
    for row in judged.itertuples():
        assert set(search_terms(row.query)).isdisjoint(search_terms(row.title))


def test_some_titles_name_a_category_above_their_leaf_and_none_of_them_is_judged(
    made: CategoryMarkets, judged: pd.DataFrame
) -> None:
    naming = made.catalog[made.catalog["title"].str.contains("Branch|가지")]
    assert 0 < len(naming) < len(made.catalog) / 2
    assert set(naming["product_id"]).isdisjoint(judged["product_id"])


def test_products_from_abroad_are_listed_in_their_own_language_and_judged(
    made: CategoryMarkets, judged: pd.DataFrame
) -> None:
    languages = judged.groupby("market")["language"].unique()
    assert set(languages["us"]) == {"en", "ko"}
    assert set(languages["kr"]) == {"ko"}
    assert not made.catalog.duplicated(["market", "product_id"]).any()


def test_titles_have_values_of_split_train_only(made: CategoryMarkets) -> None:
    assert made.catalog["title"].str.contains("Red|빨강").any()
    assert not made.catalog["title"].str.contains("Blue|파랑").any()


def test_noise_flips_grades_of_split_train_and_nothing_else(folder: Path, made: CategoryMarkets) -> None:
    noisy = category_markets(folder, FRONTS, ["ko", "en"], label_noise=1.0)
    flipped = made.judgments["grade"] != noisy.judgments["grade"]
    assert list(flipped) == list(made.judgments["split"] == "train")
    assert list(noisy.judgments["true_grade"]) == list(made.judgments["grade"])
    pd.testing.assert_frame_equal(made.catalog, noisy.catalog)


def test_parallel_text_keeps_its_split(made: CategoryMarkets) -> None:
    split = made.parallel_text.set_index("source_text")["split"]
    assert (split["가지각"], split["가지닥"], split["파랑"]) == ("train", "dev", "test")
    assert set(made.parallel_text["kind"]) == {"taxonomy name", "attribute", "sentence"}


def test_a_language_that_the_taxonomy_lacks_is_an_input_error(folder: Path) -> None:
    with pytest.raises(InputError, match=r"expected languages of .*got 'fr'"):
        category_markets(folder, [Storefront("fr", "fr")], [])
