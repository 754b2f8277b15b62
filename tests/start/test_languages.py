import sys

import pytest

from csrm.errors import ConfigError
from csrm.start.languages import propose_languages

TITLES = {
    "de": [
        "Schwarze Bratpfanne mit Deckel für Induktion",
        "Kabellose Maus mit leisen Tasten",
        "Blauer Rucksack für Kinder",
    ],
    "es": ["Cafetera italiana de seis tazas", "Sartén antiadherente con tapa de vidrio", "Mochila azul para niños"],
    "kr": ["인덕션용 프라이팬 28cm", "무선 마우스 무소음 버튼", "어린이 파란색 배낭"],
    "tw": ["不沾平底鍋附玻璃蓋", "無線靜音滑鼠 藍牙", "兒童藍色後背包"],
}


def test_languages_are_detected_in_titles() -> None:
    pytest.importorskip("py3langid")
    titles = {market: texts * 10 for market, texts in TITLES.items()}
    languages = propose_languages(titles, {}, {}, {"zh-TW", "ko", "en"}, market_column="land")
    assert {market: language for market, (language, _) in languages.items()} == {
        **{"de": "de", "es": "es", "kr": "ko"},
        "tw": "zh-TW",  # as the parallel text calls it
    }


def test_what_a_person_and_the_catalog_say_goes_first() -> None:
    titles = {"tw": TITLES["tw"], "kr": TITLES["kr"]}
    languages = propose_languages(
        titles, {"tw": "zh-Hant"}, {"tw": ["zh"], "kr": ["ko", "ko", "en"]}, set(), market_column="land"
    )
    assert languages == {"tw": ("zh-Hant", "as you said"), "kr": ("ko", "as the catalog says")}


def test_few_titles_and_unknown_markets_ask_for_the_option() -> None:
    with pytest.raises(ConfigError) as error:
        propose_languages({"kr": TITLES["kr"]}, {"us": "en"}, {}, set(), market_column="land")
    assert "--language us=en: the catalog has no market 'us', its column 'land' has ['kr']" in str(error.value)
    assert "--column catalog.market=NAME, or =null where all rows are of one market" in str(error.value)
    assert "market 'kr': 3 titles tell no language: --language kr=CODE" in str(error.value)


def test_mixed_titles_ask_for_the_option() -> None:
    pytest.importorskip("py3langid")
    mixed = [title for texts in TITLES.values() for title in [" ".join(texts)] * 10]
    with pytest.raises(ConfigError, match=r"market 'eu': \d+% of its titles are in '\w\w', too few to tell"):
        propose_languages({"eu": mixed}, {}, {}, set(), market_column="land")


def test_without_the_detector_the_message_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    with pytest.raises(ConfigError, match=r"expected --language MARKET=CODE .*, or the package py3langid"):
        propose_languages({"kr": TITLES["kr"] * 10}, {}, {}, set(), market_column="land")
