"""The text that the model sees, all of it: one prefix for each query, one suffix for each of its products.

    Task: relevance                  |
    Market: tw                       |
    Language: zh-TW                  |  prefix: shared by all products of the query
    Query: <query>                   |
    Retrieved:                       |
    - <title 1>                      |
    - <title 2>                      |
    Product: <title>                     |
    Brand: <brand>                       |
    Category: <category>                 |  suffix: one product, and the cue for the answer
    Attributes: <name> = <value>; ...    |
    Relevant:                            |

The same model learns to translate before it learns to judge:

    Task: translation
    From: ko
    To: zh-TW
    Text: <source text>
    Translation: <target text>, learnt with the line break after it

Fields are foreign text: `neutralize` takes from them whatever could read as structure. Optional fields that are empty
leave no line. This is the built-in template of `csrm.scoring.template`; a model may be configured with another one.
Changing a character of it changes every score: raise TEMPLATE_VERSION with it.
"""

from collections.abc import Mapping
from typing import NamedTuple

import regex

from csrm.scoring.template import BUILT_IN_TEMPLATE, PromptTemplate
from csrm.text import has_text, normalized

TEMPLATE_VERSION = 1
"""Of the built-in template, and of how fields are written into any."""
ANSWER_CUE = BUILT_IN_TEMPLATE.cue
MOST_CHARACTERS = 32_768
"""Of a text that is longer, the prompt knows so many characters from its start: a hostile title has a megabyte."""
_LINE_NAMES = "task|market|language|query|retrieved|product|brand|category|attributes|relevant"


# Zero-width joiner and non-joiner stay: emoji sequences and several scripts are spelled with them.
_INVISIBLE = regex.compile(r"[[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Zl}\p{Zp}]--[\u200c\u200d]]", flags=regex.V1)
_ANGLES = str.maketrans("<>", "‹›")
_ENTRY_MARKS = str.maketrans(";=", ",:")
_SQUARE_TOKEN = regex.compile(r"\[(/?[A-Z_]{2,32})\]")
_LINE_START = regex.compile(rf"(?<![a-z])({_LINE_NAMES})[\s:：]*[:：]", flags=regex.IGNORECASE)


class Line(NamedTuple):
    """One line of a prompt: template text, then the text of a field. The two are tokenised apart."""

    start: str
    """Text of the template; never cut."""
    field: str
    """Name of the field, which is the name of its budget."""
    text: str
    """The field's neutral text, with a space before it unless a line break stands there; empty where there is none. May
    be cut."""


class Query(NamedTuple):
    """What the prompt says about a query: everything that its products share.

    >>> query = Query("tw", "zh-TW", "透明手機殼", retrieved_titles=("軍規防摔透明手機殼",))
    >>> print("".join(line.start + line.text for line in prefix_lines(query)))
    Task: relevance
    Market: tw
    Language: zh-TW
    Query: 透明手機殼
    Retrieved:
    - 軍規防摔透明手機殼
    """

    market: str
    language: str
    query: str | None
    retrieved_titles: tuple[str, ...] = ()
    """Best first."""


class Product(NamedTuple):
    """What the prompt says about a product.

    >>> product = Product("Silent Wireless Mouse", brand="Norvia", attributes={"color": "black"})
    >>> print("".join(line.start + line.text for line in suffix_lines(product)).strip())
    Product: Silent Wireless Mouse
    Brand: Norvia
    Attributes: color = black
    """

    title: str | None
    brand: str | None = None
    category: str | None = None
    attributes: Mapping[str, str | None] | None = None


class Translation(NamedTuple):
    """One direction of a pair of parallel texts; languages are BCP 47."""

    source_language: str
    target_language: str
    source_text: str
    target_text: str


def neutralize(text: str | None) -> str:
    """Field text that cannot be taken for structure, of the first MOST_CHARACTERS; idempotent.

    NFC; control, format and private characters and lone surrogates become spaces, as do line breaks; runs of white
    space become one space. Angle brackets become ‹ ›, so no special token such as <bos> or <|im_end|> can be spelled;
    [INST] and its like get round brackets. The colon after a word that starts a line of the template goes.
    """
    if not text:
        return ""
    text = text[:MOST_CHARACTERS]
    # Each look is a fraction of the substitution that it spares: of most texts nothing is taken.
    visible = text if text.isprintable() else _INVISIBLE.sub(" ", text)
    visible = normalized("NFC", visible)
    if "<" in visible or ">" in visible:
        visible = visible.translate(_ANGLES)
    if "[" in visible:
        visible = _SQUARE_TOKEN.sub(r"(\1)", visible)
    if ":" in visible or "：" in visible:
        visible = _LINE_START.sub(r"\1 ", visible)
    return " ".join(visible.split())


def is_shown(text: str | None) -> bool:
    """Whether a prompt has something to show of a text: a pair whose query or title it does not show has no score."""
    return has_text(text and text[:MOST_CHARACTERS])


def prefix_lines(query: Query, template: PromptTemplate = BUILT_IN_TEMPLATE) -> list[Line]:
    """The prefix of a query, in order; the lines after the query's own are optional."""
    fields = (
        ("market", template.market, query.market),
        ("language", template.language, query.language),
        ("query", template.query, query.query),
    )
    lines = [Line(start, name, _field_text(text, start)) for name, start, text in fields if start is not None]
    lines[0] = lines[0]._replace(start=template.opening + lines[0].start)
    if (start := template.retrieved_title) is not None:
        titles = [text for title in query.retrieved_titles if (text := _field_text(title, start))]
        starts = [template.retrieved + start, *[start] * len(titles)]
        lines += [Line(own, "retrieved_title", title) for own, title in zip(starts, titles, strict=False)]
    return lines


def suffix_lines(product: Product, template: PromptTemplate = BUILT_IN_TEMPLATE) -> list[Line]:
    """The suffix of a product, in order; the lines after the title's are optional. The template's cue follows."""
    lines = [Line(template.title, "title", _field_text(product.title, template.title))]
    fields = (
        ("brand", template.brand, product.brand),
        ("category", template.category, product.category),
        ("attributes", template.attributes, None if template.attributes is None else _attribute_text(product)),
    )
    lines += [Line(start, name, _field_text(text, start)) for name, start, text in fields if start is not None]
    return [lines[0], *(line for line in lines[1:] if line.text)]


def translation_parts(text: Translation) -> list[str]:
    """Template text and field text by turns; the last field and the line break after it are to be learnt."""
    return [
        *("Task: translation\nFrom:", _field_text(text.source_language), "\nTo:", _field_text(text.target_language)),
        *("\nText:", _field_text(text.source_text), "\nTranslation:", _field_text(text.target_text), "\n"),
    ]


def prompt_text(query: Query, product: Product, template: PromptTemplate = BUILT_IN_TEMPLATE) -> str:
    """The whole prompt before any field is cut."""
    lines = prefix_lines(query, template) + suffix_lines(product, template)
    return "".join(line.start + line.text for line in lines) + template.cue


def _field_text(text: str | None, start: str = "") -> str:
    """Neutral text of a field, as it stands after a text of the template."""
    clean = neutralize(text)
    return f" {clean}" if clean and not start.endswith("\n") else clean


def _attribute_text(product: Product) -> str:
    """`name = value; ...`, sorted by name: maps have no order of their own. What a prompt does not know is not made."""
    if not product.attributes:
        return ""
    texts: list[str] = []
    num_characters = 0
    for name, value in sorted(product.attributes.items()):
        if num_characters >= MOST_CHARACTERS:
            break
        if shown := _entry_text(value):
            texts.append(f"{_entry_text(name)} = {shown}")
            num_characters += len(texts[-1])
    return "; ".join(texts)


def _entry_text(text: str | None) -> str:
    """A name or value that cannot be taken for several."""
    clean = neutralize(text)
    return clean.translate(_ENTRY_MARKS) if ";" in clean or "=" in clean else clean
