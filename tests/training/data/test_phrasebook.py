import pandas as pd
import pytest

from csrm.scoring.phrasebook import Phrasebook
from csrm.scoring.prompts import Translation
from csrm.training.data.phrasebook import with_switched_languages


@pytest.fixture
def phrasebook() -> Phrasebook:
    korean = {"레깅스": "緊身褲", "운동복": "運動服", "운동복 바지": "運動褲", "블랙": "黑色", "긴 " * 30: "長"}
    texts = [Translation("ko", "zh-TW", ko, zh) for ko, zh in korean.items()]
    texts += [Translation(text.target_language, text.source_language, *text[:1:-1]) for text in texts]
    texts += [Translation("en", "zh-TW", "Leggings", "緊身褲"), Translation("en", "zh-TW", "black", "黑色")]
    return Phrasebook([texts[:3], texts[3:]])


@pytest.mark.parametrize(
    ("text", "language", "other", "expected"),
    [
        ("블랙 레깅스", "ko", "zh-TW", "黑色 緊身褲"),
        ("운동복 바지 블랙", "ko", "zh-TW", "運動褲 黑色"),  # the longest phrase
        ("레깅스류 / 레깅스", "ko", "zh-TW", "레깅스류 / 緊身褲"),  # whole words only
        ("黑色緊身褲XL", "zh-TW", "ko", "블랙레깅스XL"),  # Han has no spaces
        ("BLACK leggings 3", "en", "zh-TW", "黑色 緊身褲 3"),
        ("모르는 말", "ko", "zh-TW", "모르는 말"),
        ("", "ko", "zh-TW", ""),
        (None, "ko", "zh-TW", ""),
        ("레깅스", "ko", "en", "레깅스"),  # no such phrases
    ],
)
def test_known_phrases_are_said_in_the_other_language(
    phrasebook: Phrasebook, text: str | None, language: str, other: str, expected: str
) -> None:
    assert phrasebook.translate(text, language, other) == expected


def test_a_phrase_has_all_its_translations_in_turn() -> None:
    texts = [Translation("ko", "zh-TW", "신발", shoes) for shoes in ("鞋子", "鞋")]
    phrasebook = Phrasebook([texts[:1], texts[1:]])
    assert [phrasebook.translate("신발", "ko", "zh-TW", choice) for choice in range(3)] == ["鞋子", "鞋", "鞋子"]
    assert phrasebook.translate("신발", "ko", "zh-TW") == "鞋子"


def test_half_of_the_titles_take_the_words_of_their_query_the_others_any() -> None:
    texts = [Translation("ko", "zh-TW", "신발", shoes) for shoes in ("鞋子", "鞋", "鞋")]
    titles = [f"신발 {number}" for number in range(400)]
    batch = _batch(200).assign(query="신발", title=titles, retrieved_titles=[("신발 1", "신발 2")] * 400)
    (switched,) = with_switched_languages([batch], Phrasebook([texts]), share=1.0, seed=1)
    assert 0.4 < (switched["query"] == "鞋").mean() < 0.6
    assert (switched.groupby("group_number")["retrieved_titles"].nunique() == 1).all()
    in_chinese = switched[switched["title"].str.startswith("鞋")]
    assert 0.4 < len(in_chinese) / len(switched) < 0.6
    for said in (in_chinese["title"], switched["retrieved_titles"].str[0], switched["retrieved_titles"].str[1]):
        assert 0.65 < (said.str.split().str[0] == switched["query"].loc[said.index]).mean() < 0.85


def test_sentences_are_not_kept(phrasebook: Phrasebook) -> None:
    assert phrasebook.translate("긴 " * 30, "ko", "zh-TW") == " ".join(["긴"] * 30)


def _batch(num_groups: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "group_number": [group for group in range(num_groups) for _ in range(2)],
            "language": "ko",
            "query": "운동복",
            "retrieved_titles": [("운동복 바지",)] * (2 * num_groups),
            "title": ["레깅스", "블랙"] * num_groups,
            "brand": [None, "블랙"] * num_groups,
            "category": ["운동복 > 레깅스", None] * num_groups,
            "attributes": [[("레깅스", "블랙"), ("운동복", None)], None] * num_groups,
            "grade": "yes",
        }
    )


def test_a_share_of_the_groups_is_switched_all_pairs_of_a_group_alike(phrasebook: Phrasebook) -> None:
    batch = _batch(200)
    (switched,) = with_switched_languages([batch], phrasebook, share=0.5, seed=1)
    for _, rows in switched.groupby("group_number"):
        texts = [tuple(row) for row in rows[["language", "query", "retrieved_titles"]].itertuples(index=False)]
        assert texts[0] == texts[1]
        assert texts[0] in {("ko", "운동복", ("운동복 바지",)), ("zh-TW", "運動服", ("運動褲",))}
        if rows["title"].to_list() == ["레깅스", "블랙"]:
            columns = ["brand", "category", "attributes"]
            pd.testing.assert_frame_equal(rows[columns], batch.loc[rows.index, columns])
        else:
            assert rows["title"].to_list() == ["緊身褲", "黑色"]
            assert rows["brand"].to_list() == ["", "黑色"]
            assert rows["category"].to_list() == ["運動服 › 緊身褲", ""]
            assert rows["attributes"].to_list() == [[("緊身褲", "黑色"), ("運動服", "")], []]
    has_query = switched["language"] == "zh-TW"
    has_products = switched["title"].isin({"緊身褲", "黑色"})
    assert 0.4 < has_query.mean() < 0.6
    assert 0.15 < has_products.mean() < 0.35
    assert not (has_products & ~has_query).any()
    pd.testing.assert_series_equal(switched["grade"], batch["grade"])


def test_a_group_that_two_batches_share_is_switched_alike_in_both(phrasebook: Phrasebook) -> None:
    batch = _batch(50)
    (whole,) = with_switched_languages([batch], phrasebook, share=0.5, seed=1)
    parts = with_switched_languages([batch[:33], batch[33:]], phrasebook, share=0.5, seed=1)
    pd.testing.assert_frame_equal(pd.concat(parts), whole)


def test_a_language_without_phrases_stays(phrasebook: Phrasebook) -> None:
    batch = _batch(5).assign(language="th")
    (switched,) = with_switched_languages([batch], phrasebook, share=1.0, seed=1)
    pd.testing.assert_frame_equal(switched, batch)
