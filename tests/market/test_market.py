import gzip
import os
import re
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from csrm.errors import ConfigError, InputError
from csrm.market import Lexicon, Market, builtin_lexicon, generate_market, parallel_text, read_taxonomy_lexicon
from csrm.market.facts import GRADES, NOTHING, Facts, grade_products
from csrm.market.generator import JUDGED_PER_QUERY, split_of, with_label_noise
from csrm.market.lexicon import Category
from csrm.schemas import BEHAVIOUR, CATALOG, JUDGMENTS, PARALLEL_TEXT, QUERIES

MARKETS = {"kr": "ko", "tw": "zh-TW", "us": "en"}
TABLES = {"catalog": CATALOG, "queries": QUERIES, "behaviour": BEHAVIOUR, "judgments": JUDGMENTS}


@pytest.fixture(scope="module")
def market() -> Market:
    return generate_market(seed=3, markets=MARKETS, num_products=1000, num_queries=100)


# Shoes (0) are replaced by boots (1) and go with socks (2); hats (3) are something else. Slots: colour, size.
SHOES = Category(("shoes",), "wear", ("colour", "size"), (0,), substitutes=frozenset({1}), complements=frozenset({2}))
OTHERS = [Category((name,), "wear", ("colour",), (0,)) for name in ("boots", "socks", "hats")]


@pytest.mark.parametrize(
    ("wanted", "product", "grade"),
    [
        ((0, NOTHING, [NOTHING, NOTHING]), (0, 5, [1, 2]), "E"),  # shoes: any will do
        ((0, NOTHING, [1, NOTHING]), (0, 5, [1, 2]), "E"),  # black shoes: these are
        ((0, NOTHING, [1, 2]), (0, NOTHING, [1, 2]), "E"),  # black shoes, size 8: these are, of no brand
        ((0, 5, [NOTHING, NOTHING]), (0, 5, [1, 2]), "E"),  # shoes of a brand: these are
        ((0, NOTHING, [1, NOTHING]), (0, 5, [0, 2]), "S"),  # black shoes: white ones
        ((0, NOTHING, [1, 2]), (0, 5, [1, 3]), "S"),  # black shoes, size 8: black ones, size 9
        ((0, 5, [NOTHING, NOTHING]), (0, 6, [1, 2]), "S"),  # shoes of a brand: of another brand
        ((0, 5, [NOTHING, NOTHING]), (0, NOTHING, [1, 2]), "S"),  # shoes of a brand: of no brand
        ((0, NOTHING, [NOTHING, NOTHING]), (1, 5, [1, NOTHING]), "S"),  # shoes: boots
        ((0, NOTHING, [1, NOTHING]), (2, 5, [0, NOTHING]), "C"),  # black shoes: white socks
        ((0, 5, [1, NOTHING]), (3, 5, [1, NOTHING]), "I"),  # black shoes of a brand: its black hats
    ],
)
def test_grades_follow_from_facts(
    wanted: tuple[int, int, list[int]], product: tuple[int, int, list[int]], grade: str
) -> None:
    facts = [Facts(np.array([row[0]]), np.array([row[1]]), np.array([row[2]])) for row in (wanted, product)]
    places = grade_products(facts[0], facts[1], [SHOES, *OTHERS])
    assert [GRADES[place] for place in places] == [grade]


def test_frames_have_the_declared_columns_unique_keys_and_no_missing_required_value(market: Market) -> None:
    for name, table in TABLES.items():
        frame = getattr(market, name)
        assert list(frame.columns) == table.column_names
        assert not frame.duplicated(list(table.key)).any()
        assert frame[[column.name for column in table.columns if column.required]].notna().all(axis=None)
        assert set(frame["market"]) == set(MARKETS)


def test_judged_and_clicked_pairs_name_rows_of_the_catalog_and_the_queries(market: Market) -> None:
    queries = market.queries.drop(columns="language")
    judged = market.judgments.merge(market.catalog, on=["market", "product_id"]).merge(queries)
    assert len(judged) == len(market.judgments)
    assert judged["title"].notna().all()
    clicked = market.behaviour.merge(market.catalog, on=["market", "product_id"]).merge(queries)
    assert len(clicked) == len(market.behaviour)


def test_same_seed_gives_the_same_tables_and_another_seed_does_not(market: Market) -> None:
    again = generate_market(seed=3, markets=MARKETS, num_products=1000, num_queries=100)
    other = generate_market(seed=4, markets=MARKETS, num_products=1000, num_queries=100)
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(market, name), getattr(again, name))
        assert not getattr(market, name).equals(getattr(other, name))


def test_a_market_does_not_depend_on_the_others(market: Market) -> None:
    alone = generate_market(seed=3, markets={"tw": "zh-TW"}, num_products=1000, num_queries=100)
    for name in TABLES:
        frame = getattr(market, name)
        pd.testing.assert_frame_equal(frame[frame["market"] == "tw"].reset_index(drop=True), getattr(alone, name))


def test_products_that_are_listed_from_abroad_come_after_the_markets_own_and_change_nothing_else(
    market: Market,
) -> None:
    settings = {"num_products": 1000, "num_queries": 100}
    with_listed = generate_market(seed=3, markets=MARKETS, **settings, listed={"tw": "ko"})  # type: ignore[arg-type]
    for name in ("queries", "behaviour", "judgments"):
        pd.testing.assert_frame_equal(getattr(with_listed, name), getattr(market, name))
    own, listed = with_listed.catalog[:3000], with_listed.catalog[3000:]
    pd.testing.assert_frame_equal(own, market.catalog)
    assert len(listed) == 100
    assert set(listed["market"]) == {"tw"}
    assert set(listed["language"]) == {"ko"}
    assert listed["title"].dropna().str.contains("[가-힣]").mean() > 0.98
    assert not with_listed.catalog.duplicated(list(CATALOG.key)).any()
    kr = market.catalog.loc[market.catalog["market"] == "kr", "title"]
    assert len(set(listed["title"].dropna()) & set(kr)) < 10


def test_markets_of_one_language_have_different_products(market: Market) -> None:
    two = generate_market(seed=3, markets={"us": "en", "uk": "en"}, num_products=200, num_queries=10).catalog
    titles = [set(two.loc[two["market"] == name, "title"].dropna()) for name in ("us", "uk")]
    assert len(titles[0] & titles[1]) < 20


def test_every_query_has_each_grade_that_its_category_allows(market: Market) -> None:
    counts = market.judgments.groupby(["market", "query_id", "grade"]).size().unstack(fill_value=0)
    for grade, most in JUDGED_PER_QUERY.items():
        assert counts[grade].max() <= most
    assert (counts["I"] == JUDGED_PER_QUERY["I"]).all()
    assert (counts["E"] >= 1).mean() > 0.98  # the product that a query was drawn from may have no title
    assert (counts["S"] >= 1).mean() > 0.5
    assert (counts["C"] >= 1).mean() > 0.9


def test_products_of_grade_e_share_one_category_that_no_other_than_s_has(market: Market) -> None:
    judged = market.judgments.merge(market.catalog[["market", "product_id", "category"]])
    judged = judged[judged["category"].str.contains(" > ", na=False)]
    exact = judged[judged["grade"] == "E"].groupby(["market", "query_id"])["category"].agg(set).rename("exact")
    assert exact.map(len).eq(1).all()
    rest = judged[judged["grade"].isin(["C", "I"])].join(exact, on=["market", "query_id"], how="inner")
    assert not any(category in found for category, found in zip(rest["category"], rest["exact"], strict=True))


def test_products_of_grade_e_have_the_value_that_the_query_names(market: Market) -> None:
    us = market.judgments.query("market == 'us' and grade == 'E'")
    pairs = us.merge(market.queries).merge(market.catalog, on=["market", "product_id"])
    black = pairs[pairs["query"].str.contains(r"\b(?:black|onyx)\b", case=False)].dropna(subset="attributes")
    colours = black["attributes"].map(lambda attributes: attributes.get("Color")).dropna()
    assert len(colours) > 5
    assert set(colours) == {"Black"}


def test_label_noise_replaces_its_share_of_grades_and_changes_nothing_else(market: Market) -> None:
    noisy = generate_market(seed=3, markets=MARKETS, num_products=1000, num_queries=100, label_noise=0.2)
    for name in ("catalog", "queries", "behaviour"):
        pd.testing.assert_frame_equal(getattr(noisy, name), getattr(market, name))
    pd.testing.assert_frame_equal(noisy.judgments.drop(columns="grade"), market.judgments.drop(columns="grade"))
    assert (market.judgments["true_grade"] == market.judgments["grade"]).all()
    num_pairs = len(market.judgments)
    num_changed = int((noisy.judgments["grade"] != noisy.judgments["true_grade"]).sum())
    assert abs(num_changed - 0.2 * num_pairs) < 4 * (num_pairs * 0.2 * 0.8) ** 0.5


def test_replaced_grades_are_each_other_grade_equally_often() -> None:
    noisy = with_label_noise(np.random.default_rng(0), np.full(30_000, 1), 1.0)
    counts = np.bincount(noisy, minlength=4)
    assert counts[1] == 0
    assert np.abs(counts[[0, 2, 3]] - 10_000).max() < 4 * (30_000 * (1 / 3) * (2 / 3)) ** 0.5


def test_shoppers_click_relevant_products_more_but_also_irrelevant_ones(market: Market) -> None:
    clicks = market.judgments.merge(market.queries).merge(market.behaviour, how="left").fillna({"count": 0})
    share = (clicks["count"] > 0).groupby(clicks["grade"]).mean()
    assert share["E"] > 2 * share["I"] > 0
    for name in MARKETS:
        num_clicked = market.behaviour.loc[market.behaviour["market"] == name, "query"].nunique()
        assert abs(num_clicked - 60) < 4 * (100 * 0.6 * 0.4) ** 0.5


@pytest.mark.parametrize(("query", "split"), [("jeans", "dev"), ("Shoes", "test"), ("러닝화", "train")])
def test_split_is_a_hash_of_the_query(query: str, split: str) -> None:
    """Expected: the first 8 digits of sha256sum of the lower-cased query as a number; dev ends in 8, test in 9."""
    assert split_of(query) == split


def test_splits_are_80_10_10() -> None:
    splits = [split_of(f"query {number}") for number in range(10_000)]
    assert abs(splits.count("dev") - 1000) < 4 * (10_000 * 0.1 * 0.9) ** 0.5
    assert abs(splits.count("test") - 1000) < 4 * (10_000 * 0.1 * 0.9) ** 0.5


def terms(text: str) -> set[str]:
    """Words; for Korean and Chinese pairs of characters."""
    words = re.findall(r"\w+", text.casefold())
    return {
        word[start : start + 2] if not word.isascii() else word
        for word in words
        for start in range(max(1, len(word) - 1))
    }


@pytest.mark.parametrize("name", MARKETS)
def test_shared_words_alone_do_not_tell_relevance(market: Market, name: str) -> None:
    pairs = market.judgments[market.judgments["market"] == name].merge(market.queries)
    pairs = pairs.merge(market.catalog, on=["market", "product_id"])
    shares_term = np.array(
        [bool(terms(query) & terms(title)) for query, title in zip(pairs["query"], pairs["title"], strict=True)]
    )
    overlap = pd.Series(shares_term).groupby(pairs["grade"].to_numpy()).mean()
    assert 0.5 < overlap["E"] < 0.9  # synonyms, and titles that do not name their category
    assert 0.02 < overlap["I"] < overlap["E"]  # same colour or brand


def all_words(lexicon: Lexicon) -> list[str]:
    names = [name for category in lexicon.categories for name in (*category.names, category.department)]
    return names + [form for attribute in lexicon.attributes.values() for forms in attribute.values for form in forms]


def test_each_lexicon_is_written_in_its_own_script() -> None:
    assert all(word.isascii() for word in all_words(builtin_lexicon("en")))
    korean, chinese = builtin_lexicon("ko"), builtin_lexicon("zh-TW")
    names = [name for category in korean.categories for name in category.names]
    assert all(re.fullmatch(r"[가-힣 ]+", name) for name in names)
    assert all(re.search(r"[一-鿿]", name) for category in chinese.categories for name in category.names)
    for word in all_words(chinese):
        word.encode("big5")  # has no simplified characters
        assert not re.search(r"[가-힣ぁ-ヿ]", word)


def test_titles_and_queries_are_written_in_their_languages_script(market: Market) -> None:
    for frame, text in ((market.catalog, "title"), (market.queries, "query")):
        texts = {name: frame.loc[frame["market"] == name, text].dropna() for name in MARKETS}
        assert texts["kr"].str.contains("[가-힣]").mean() > 0.98
        assert texts["tw"].str.contains("[一-鿿]").mean() > 0.98
        assert not texts["tw"].str.contains("[가-힣ぁ-ゖァ-ヺ]").any()
        assert texts["us"].str.replace("[✨🔥]", "", regex=True).map(str.isascii).all()


def test_lexicons_have_the_same_categories_with_synonyms_in_every_language() -> None:
    lexicons = [builtin_lexicon(language) for language in MARKETS.values()]
    for one, other in pairwise(lexicons):
        assert len(one.categories) == len(other.categories)
        assert list(one.attributes) == list(other.attributes)
    for lexicon in lexicons:
        names = [name.casefold() for category in lexicon.categories for name in category.names]
        assert len(set(names)) == len(names)
        for place, category in enumerate(lexicon.categories):
            assert len(category.names) >= 2
            assert category.brands
            assert not {place} & (category.substitutes | category.complements)
            assert not category.substitutes & category.complements


def test_every_catalog_has_a_little_dirt(market: Market) -> None:
    for _, catalog in market.catalog.groupby("market"):
        assert 1 <= catalog["title"].isna().sum() <= 10
        assert 1 <= (catalog["title"].str.len() > 600).sum() <= 10
        assert 1 <= catalog["title"].str.contains("✨").sum() <= 30
        for column in ("brand", "category", "attributes", "language"):
            assert 0.01 < catalog[column].isna().mean() < 0.1


def test_a_market_of_one_product_can_be_made() -> None:
    tiny = generate_market(seed=0, markets={"us": "en"}, num_products=1, num_queries=1)
    assert len(tiny.catalog) == len(tiny.queries) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed: expected 0 or more, got -1"),
        ({"num_products": 0, "num_queries": 0}, "num_products: expected 1 or more, got 0; num_queries: expected 1"),
        ({"label_noise": 1.5}, "label_noise: expected 0 to 1, got 1.5"),
        ({"markets": {}}, "expected at least one market"),
        ({"listed": {"tw": "ko"}}, r"listed: expected markets of \['us'\], got \{'tw': 'ko'\}"),
        ({"listed": {"us": "fr"}}, "expected a language of .*got 'fr'"),
        ({"markets": {"fr": "fr"}}, "expected a language of .*'en', 'ko', 'zh-TW'.*got 'fr'"),
        ({"markets": {"fr": "fr"}, "lexicons": {}}, r"got none for \['fr'\]"),
        ({"num_products": 1, "num_queries": 300}, "expected 300 different queries, got .* fewer queries"),
    ],
)
def test_unusable_arguments_are_explained(changes: dict[str, object], message: str) -> None:
    arguments = {"seed": 0, "markets": {"us": "en"}, "num_products": 5, "num_queries": 2} | changes
    with pytest.raises(ConfigError, match=message):
        generate_market(**arguments)  # type: ignore[arg-type]


CATEGORIES = """id\tparent_id\ten\tko\ten_path\tko_path
w\t\tWear\t의류\tWear\t의류
w-1\tw\tShoes\t신발\tWear > Shoes\t의류 > 신발
w-1-1\tw-1\tBoots\t부츠\tWear > Shoes > Boots\t의류 > 신발 > 부츠
w-1-2\tw-1\tSandals\t샌들\tWear > Shoes > Sandals\t의류 > 신발 > 샌들
w-2\tw\t"Hats"\t모자\tWear > Hats\t의류 > 모자
"""
VALUES = """attribute_id\ten\tko
color\tRed\t레드
color\tNA\t없음
color\tOther\t기타
"""
ATTRIBUTES = "id\ten\tko\ncolor\tColor\t색상\nsize\tSize\t크기\n"
CATEGORY_ATTRIBUTES = "category_id\tattribute_id\nw-1-1\tcolor\nw-1-1\tsize\nw-2\tcolor\n"


@pytest.fixture
def taxonomy(tmp_path: Path) -> Path:
    for name, text in {
        "categories": CATEGORIES,
        "values": VALUES,
        "attributes": ATTRIBUTES,
        "category_attributes": CATEGORY_ATTRIBUTES,
    }.items():
        (tmp_path / f"{name}.tsv.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def test_a_taxonomys_leaves_values_and_siblings_become_a_lexicon(taxonomy: Path) -> None:
    lexicon = read_taxonomy_lexicon(taxonomy, "ko")
    assert [category.names for category in lexicon.categories] == [("부츠",), ("샌들",), ("모자",)]
    assert {category.department for category in lexicon.categories} == {"의류"}
    assert [category.attributes for category in lexicon.categories] == [("color",), (), ("color",)]
    assert [category.substitutes for category in lexicon.categories] == [{1}, {0}, set()]
    assert list(lexicon.attributes) == ["color"]  # size has no values
    assert lexicon.attributes["color"].name == "색상"
    assert lexicon.attributes["color"].values == (("레드",), ("없음",))  # without Other, with the text NA
    assert read_taxonomy_lexicon(taxonomy, "en").categories[2].names == ('"Hats"',)


def test_a_market_can_be_made_from_a_taxonomy(taxonomy: Path) -> None:
    lexicons = {"ko": read_taxonomy_lexicon(taxonomy, "ko")}
    made = generate_market(seed=1, markets={"kr": "ko"}, num_products=40, num_queries=5, lexicons=lexicons)
    assert made.catalog["title"].str.contains("부츠|샌들|모자").mean() > 0.7
    assert set(made.judgments["grade"]) <= {"E", "S", "I"}


def test_all_problems_of_a_taxonomy_folder_come_in_one_message(taxonomy: Path) -> None:
    (taxonomy / "values.tsv.gz").unlink()
    (taxonomy / "attributes.tsv.gz").write_text("not compressed")
    (taxonomy / "category_attributes.tsv.gz").write_bytes(gzip.compress(b"category\tattribute_id\nw-1\tcolor\n"))
    (taxonomy / "categories.tsv.gz").write_bytes(gzip.compress(CATEGORIES.replace("\t부츠\t", "\t\t").encode()))
    with pytest.raises(InputError) as caught:
        read_taxonomy_lexicon(taxonomy, "ko")
    message = str(caught.value)
    assert "4 problems" in message
    assert "values.tsv.gz: no such file" in message
    assert "attributes.tsv.gz: expected gzipped" in message
    assert "missing columns ['category_id']; it has ['category', 'attribute_id']" in message
    assert "expected text in every row of ['ko']" in message
    assert "Is this the folder" in message


@pytest.mark.parametrize(
    "content",
    [b"", gzip.compress(b""), gzip.compress(b"id\ten\n\xff\t1\n"), gzip.compress(b"x" * 99)[:20]],
    ids=["no gzip", "empty", "no UTF-8", "cut off"],
)
def test_a_damaged_taxonomy_file_is_an_input_error(taxonomy: Path, content: bytes) -> None:
    (taxonomy / "attributes.tsv.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"attributes\.tsv\.gz"):
        read_taxonomy_lexicon(taxonomy, "en")


def test_a_language_that_a_taxonomy_lacks_is_an_input_error(taxonomy: Path) -> None:
    with pytest.raises(InputError, match=r"expected a language of .*got 'xx'"):
        read_taxonomy_lexicon(taxonomy, "xx")
    with pytest.raises(InputError, match=r"categories\.tsv\.gz: missing columns \['ja', 'ja_path'\]"):
        read_taxonomy_lexicon(taxonomy, "ja")


def test_the_real_taxonomy_gives_markets_in_five_languages() -> None:
    folder = Path(os.environ.get("CSRM_DATA", "")) / "shopify_taxonomy"
    if "CSRM_DATA" not in os.environ or not folder.is_dir():
        pytest.skip("set CSRM_DATA to the folder that holds shopify_taxonomy")
    markets = {"jp": "ja", "kr": "ko", "tw": "zh-TW", "es": "es", "us": "en"}
    lexicons = {language: read_taxonomy_lexicon(folder, language) for language in markets.values()}
    assert {len(lexicon.categories) > 5000 for lexicon in lexicons.values()} == {True}
    made = generate_market(seed=1, markets=markets, num_products=1000, num_queries=20, lexicons=lexicons)
    for name in markets:
        grades = made.judgments.loc[made.judgments["market"] == name, "grade"]
        assert set(grades) == {"E", "S", "I"}


def test_parallel_text_says_the_same_in_two_languages() -> None:
    lexicons = [builtin_lexicon(language) for language in ("ko", "zh-TW", "en")]
    texts = parallel_text(7, lexicons)
    assert list(texts.columns) == PARALLEL_TEXT.column_names
    pairs = texts.groupby(["source_language", "target_language"]).size()
    assert list(pairs.index) == [("ko", "en"), ("ko", "zh-TW"), ("zh-TW", "en")]
    assert set(texts["kind"]) == {"taxonomy name", "attribute", "title"}
    is_title = texts["kind"] == "title"
    assert texts.loc[is_title, "split"].value_counts(normalize=True)["train"] == pytest.approx(0.8, abs=0.05)
    assert set(texts.loc[~is_title, "split"]) == {"train"}
    brands = [set(product(a, b)) for a, b in zip(lexicons[0].brands, lexicons[1].brands, strict=True)]
    chinese = texts[texts["target_language"] == "zh-TW"]
    expected = {*set().union(*brands), ("색상", "顏色")}
    assert expected <= set(zip(chinese["source_text"], chinese["target_text"], strict=True))
    assert (texts.groupby(["source_language", "source_text"])["split"].nunique() == 1).all()
    names = texts[(texts["kind"] == "taxonomy name") & (texts["target_language"] == "en")]
    korean, english = lexicons[0].categories, lexicons[2].categories
    expected = {(a.names[0], b.names[0]) for a, b in zip(korean, english, strict=True)}
    assert expected <= set(zip(names["source_text"], names["target_text"], strict=True))
    pd.testing.assert_frame_equal(texts, parallel_text(7, lexicons))
    titles = texts[(texts["kind"] == "title") & (texts["target_language"] == "en")]
    models = titles[["source_text", "target_text"]].apply(lambda text: text.str.extract(r"([A-Z]{2}-\d{3})")[0])
    both = models.dropna()  # some templates leave the model out
    assert len(both) > 150
    assert (both["source_text"] == both["target_text"]).all()  # both titles are of one product
