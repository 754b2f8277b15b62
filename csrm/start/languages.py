"""The language of each market: as its tables say, else detected in its titles."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from csrm.errors import ConfigError

TEXTS_AT_ONCE = 5
"""Titles that are judged together: one alone is short, and has names in it."""
FEWEST_TEXTS = 20
"""Titles that a language is told by."""
LEAST_SHARE = 0.6
"""Of the titles, from which on they are in one language."""
STOREFRONT_LANGUAGES = (
    *("ar", "bg", "bn", "cs", "da", "de", "el", "en", "es", "et", "fa", "fi", "fr", "he", "hi", "hr", "hu", "id", "it"),
    *("ja", "ko", "lt", "lv", "ms", "nl", "no", "pl", "pt", "ro", "ru", "sk", "sl", "sr", "sv", "ta", "th", "tr", "uk"),
    *("ur", "vi", "zh"),
)
"""What is told apart: languages of large markets. Short titles look like small neighbours of these (gl, yue)."""


def detected_language(texts: Sequence[str]) -> tuple[str, float]:
    """The language of most texts, by py3langid, and the share of the texts that have it.

    Raises:
        ConfigError: py3langid is not installed.
    """
    try:
        from py3langid import classify, set_languages
    except ImportError as error:
        raise ConfigError(
            "languages: expected --language MARKET=CODE for each market, or the package py3langid, which detects them: "
            "pip install 'csrm[eval]'."
        ) from error
    set_languages(STOREFRONT_LANGUAGES)
    parts = [" ".join(texts[start : start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE)]
    ((language, count),) = Counter(classify(part)[0] for part in parts).most_common(1)
    return str(language), count / len(parts)


def propose_languages(
    titles: Mapping[str, Sequence[str]],
    given: Mapping[str, str],
    said: Mapping[str, Sequence[str]],
    known: Collection[str],
    *,
    market_column: str,
) -> dict[str, tuple[str, str]]:
    """Language of each market, and why.

    Args:
        titles: market to some of its titles.
        given: market to its language, as a person said.
        said: market to the values of its catalog's column `language`.
        known: languages of the parallel text; of a detected one, the name there is taken (zh becomes zh-TW).
        market_column: what the catalog calls its column for the market.

    Raises:
        ConfigError: a market is not in the catalog, or its language cannot be told; all in one message.
    """
    problems = [
        f"--language {market}={language}: the catalog has no market {market!r}, its column {market_column!r} has "
        f"{sorted(titles)}. Where that column is no market: --column catalog.market=NAME, or =null where all "
        "rows are of one market"
        for market, language in given.items()
        if market not in titles
    ]
    languages: dict[str, tuple[str, str]] = {}
    for market, texts in titles.items():
        if market in given:
            languages[market] = given[market], "as you said"
        elif said.get(market):
            languages[market] = Counter(said[market]).most_common(1)[0][0], "as the catalog says"
        elif len(texts) < FEWEST_TEXTS:
            problems.append(f"market {market!r}: {len(texts)} titles tell no language: --language {market}=CODE")
        else:
            language, share = detected_language(texts)
            if share < LEAST_SHARE:
                problems.append(
                    f"market {market!r}: {share:.0%} of its titles are in {language!r}, too few to tell: "
                    f"--language {market}=CODE"
                )
                continue
            named = [name for name in sorted(known) if name.partition("-")[0].lower() == language]
            language = named[0] if len(named) == 1 else language
            languages[market] = language, f"detected in {share:.0%} of {len(texts)} titles"
    if problems:
        raise ConfigError("languages:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return languages
