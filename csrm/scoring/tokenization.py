"""Prompts to token ids: each piece tokenised on its own, each field within its budget.

Because pieces are tokenised apart, a prefix has the same tokens whatever product follows, and cutting a field never
touches the template: the query's line and the answer cue are always there.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import regex
from pydantic import ConfigDict
from tokenizers import Tokenizer

from csrm.errors import ConfigError
from csrm.scoring.labels import Label
from csrm.scoring.prompts import (
    Line,
    Product,
    Query,
    Translation,
    prefix_lines,
    suffix_lines,
    translation_parts,
)
from csrm.scoring.template import BUILT_IN_TEMPLATE, PromptTemplate

_MARK_CHARACTER = regex.compile(r"[\p{ASCII}&&[^\p{L}\p{N}\s.,&+'\-]]", flags=regex.V1)
_CHAT_TOKEN = regex.compile(r"<\|[^<>|\s]+\|>")
SEEN_TOKENS_NAME = "seen_tokens.bin"
"""File of a trained model and of its bundle: one bit for each token id, whether the training saw it; the first is the
highest of a byte. Models that others trained have none."""
CHARACTERS_PER_TOKEN = 64
"""A field is cut to so many characters per token of its budget before it is tokenised: bounds the work on huge text."""


@dataclass(frozen=True)
class Budgets:
    """Most tokens that each part of a prompt may take. All are counts of tokens, from 1.

    >>> Budgets(query=24).query
    24

    Raises:
        ConfigError: a number is below 1 or not whole.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    market: int = 8
    language: int = 8
    query: int = 48
    retrieved_title: int = 24
    """Each retrieved title."""
    prefix: int = 224
    """The whole prefix; retrieved titles that do not fit any more are cut, then dropped, from the last."""
    title: int = 48
    brand: int = 12
    category: int = 24
    attributes: int = 48
    suffix: int = 128
    """The whole suffix; attributes, category and brand give way first, in this order."""

    @property
    def prompt(self) -> int:
        """Most tokens of a prompt."""
        return self.prefix + self.suffix

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value}" for name, value in asdict(self).items() if not isinstance(value, int) or value < 1
        ]
        if wrong:
            raise ConfigError(f"budgets: expected whole numbers of tokens from 1; {', '.join(wrong)}.")


class PromptPart(NamedTuple):
    """One field of a prompt, as the model reads it."""

    field: str
    """Name of its budget: market, language, query, retrieved_title, title, brand, category or attributes."""
    text: str
    """What the prompt holds of it."""
    cut: str
    """The rest of its first MOST_CHARACTERS, which its budget or that of the whole prefix or suffix cut off; else
    empty."""
    num_tokens: int


class PromptTokenizer:
    """Token ids of prefixes and suffixes. The same text gives the same ids, in training, export and scoring.

    >>> from csrm.bundle import load_bundle
    >>> tokenizer = load_bundle("conf/demo_bundle").prompt_tokenizer()
    >>> (suffix_ids,) = tokenizer.suffix_ids([Product("Mouse Pad XL")])
    >>> tokenizer.decode(suffix_ids).split()  # this model's tokenizer knows lower case only
    ['product:', 'mouse', 'pad', 'xl', 'relevant:']
    """

    def __init__(self, tokenizer: Tokenizer, budgets: Budgets, *, template: PromptTemplate = BUILT_IN_TEMPLATE) -> None:
        """Make one of a model's tokenizer.

        Args:
            tokenizer: of the model; its own truncation and padding are switched off.
            budgets: must leave room for the query in the prefix and for the title in the suffix.
            template: of the prompts.

        Raises:
            ConfigError: a budget is too small for the template with its required fields, or the tokenizer lacks a
                special token of the template.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = False
        # What the tokenizer puts before a text (<bos>, where the model has one).
        self._start_ids = _leading_special_ids(tokenizer)
        self._tokenizer = tokenizer
        self.template = template
        """Of its prompts."""
        # Of the template alone, special tokens become what they are.
        self._template_ids = {text: self._encode(text) for text in _template_texts(template)}
        tokenizer.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder()
        marks = {id_: token for id_, token in added.items() if token.special or _is_mark(token.content)}
        self._mark_ids = frozenset(marks)
        # encode_special_tokens does not hold for the others: text that spells one would become it.
        spelled = sorted({token.content for token in marks.values() if not token.special}, key=len, reverse=True)
        self._spelled_mark = regex.compile("|".join(map(regex.escape, spelled))) if spelled else None
        self.budgets = budgets
        self._limits = asdict(budgets)
        self._check_special_tokens()
        self._check_room()

    @classmethod
    def from_file(
        cls, path: str | Path, budgets: Budgets, *, template: PromptTemplate = BUILT_IN_TEMPLATE
    ) -> "PromptTokenizer":
        """Load a `tokenizer.json`."""
        return cls(Tokenizer.from_file(str(path)), budgets, template=template)

    @classmethod
    def from_json(
        cls, text: str, budgets: Budgets, *, template: PromptTemplate = BUILT_IN_TEMPLATE
    ) -> "PromptTokenizer":
        """From the text of a `tokenizer.json`."""
        return cls(Tokenizer.from_str(text), budgets, template=template)

    def prefix_ids(self, queries: Sequence[Query]) -> list[list[int]]:
        """Token ids of each query's prefix, at most `budgets.prefix` each; the query is never lost."""
        all_lines = [prefix_lines(query, self.template) for query in queries]
        field_ids = self._field_ids(all_lines)
        return [self._joined(self._start_ids, lines, field_ids, self.budgets.prefix, []) for lines in all_lines]

    def suffix_ids(self, products: Sequence[Product]) -> list[list[int]]:
        """Token ids of each product's suffix, at most `budgets.suffix` each, ending with the cue."""
        all_lines = [suffix_lines(product, self.template) for product in products]
        field_ids = self._field_ids(all_lines)
        cue_ids = self._template(self.template.cue)
        return [self._joined([], lines, field_ids, self.budgets.suffix, cue_ids) for lines in all_lines]

    def uncut_ids(self, lines: Sequence[Line]) -> list[list[int]]:
        """Token ids of the text of some lines, before a budget cuts them; of a huge text those of its beginning."""
        return list(self._ids_of_text([self._beginning(line) for line in lines]))

    def prompt_parts(self, query: Query, product: Product) -> list[PromptPart]:
        """What a prompt says field by field, in its order, and what the budgets cut from each.

        A field that has no room at all is there with an empty text and no token.
        """
        parts = []
        cue_ids = self._template(self.template.cue)
        for lines, room in (
            (prefix_lines(query, self.template), self.budgets.prefix - len(self._start_ids)),
            (suffix_lines(product, self.template), self.budgets.suffix - len(cue_ids)),
        ):
            kept = [len(ids) for _, ids in self._kept(lines, self._field_ids([lines]), room)]
            counts = [*kept, *[0] * (len(lines) - len(kept))]
            parts += [self._part(line, count) for line, count in zip(lines, counts, strict=True)]
        return parts

    def translation_ids(self, texts: Sequence[Translation], text_tokens: int) -> list[tuple[list[int], list[int]]]:
        """Token ids of translations: what is given, and what is to be learnt.

        Args:
            texts: what to translate, and how it is translated.
            text_tokens: most tokens of each text.
        """
        all_parts = [translation_parts(text) for text in texts]
        fields = [part for parts in all_parts for part in parts[1::2]]
        ids_of_fields = self._ids_of_text([field[: CHARACTERS_PER_TOKEN * text_tokens] for field in fields])
        field_ids = iter([ids[:text_tokens] for ids in ids_of_fields])
        result = []
        for parts in all_parts:
            pieces = [next(field_ids) if number % 2 else self._template(part) for number, part in enumerate(parts)]
            given = [*self._start_ids, *(id_ for piece in pieces[:-2] for id_ in piece)]
            result.append((given, [*pieces[-2], *pieces[-1]]))
        return result

    def label_ids(self, labels: Sequence[Label]) -> list[int]:
        """Token id of each label.

        Raises:
            ConfigError: a label is not exactly one token, or two labels are the same token.
        """
        encoded = [self._encode(label.token) for label in labels]
        wrong = [
            f"{label.token!r} is {len(ids)} tokens" for label, ids in zip(labels, encoded, strict=True) if len(ids) != 1
        ]
        if wrong:
            raise ConfigError(
                f"labels: each must be one token of the tokenizer; {', '.join(wrong)}. Choose other words."
            )
        ids = [ids[0] for ids in encoded]
        if len(set(ids)) < len(ids):
            raise ConfigError(f"labels: tokens must differ; {[label.token for label in labels]} are ids {ids}.")
        return ids

    def tokens_per_character(self, texts: Sequence[str]) -> float:
        """Tokens for each character: above 1 the tokenizer hardly knows the texts' script and spells it in bytes."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return sum(len(encoding.ids) for encoding in encodings) / max(1, sum(map(len, texts)))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included; for messages and tests."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _template(self, text: str) -> list[int]:
        if text not in self._template_ids:
            self._template_ids[text] = self._encode(text)
        return self._template_ids[text]

    def _field_ids(self, all_lines: Iterable[Sequence[Line]]) -> dict[tuple[str, str], list[int]]:
        """Token ids of every (field, text), cut to the field's budget; equal ones are tokenised once."""
        fields = {(line.field, line.text): self._beginning(line) for lines in all_lines for line in lines}
        ids_of_fields = self._ids_of_text([*fields.values()])
        return {key: ids[: self._limits[key[0]]] for key, ids in zip(fields, ids_of_fields, strict=True)}

    def _beginning(self, line: Line) -> str:
        return line.text[: CHARACTERS_PER_TOKEN * self._limits[line.field]]

    def _ids_of_text(self, texts: list[str]) -> Iterator[list[int]]:
        """Token ids of foreign texts, which become none of the tokenizer's marks, whatever they spell."""
        if self._spelled_mark is not None:
            texts = [self._spelled_mark.sub(_broken, text) for text in texts]
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = encoding.ids
            yield ids if self._mark_ids.isdisjoint(ids) else [id_ for id_ in ids if id_ not in self._mark_ids]

    def _joined(
        self,
        start_ids: Sequence[int],
        lines: Sequence[Line],
        field_ids: dict[tuple[str, str], list[int]],
        limit: int,
        cue_ids: Sequence[int],
    ) -> list[int]:
        """Token ids of the lines that there is room for; then the cue."""
        ids = list(start_ids)
        for line, kept_ids in self._kept(lines, field_ids, limit - len(start_ids) - len(cue_ids)):
            ids += self._template(line.start)
            ids += kept_ids
        ids += cue_ids
        return ids

    def _kept(
        self, lines: Sequence[Line], field_ids: dict[tuple[str, str], list[int]], room: int
    ) -> Iterator[tuple[Line, list[int]]]:
        """Lines in order, with their field's ids, while there is room for at least one token of a line's field."""
        for line in lines:
            room -= len(self._template(line.start))
            if room < 1:
                return
            kept_ids = field_ids[line.field, line.text][:room]
            room -= len(kept_ids)
            yield line, kept_ids

    def _part(self, line: Line, num_tokens: int) -> PromptPart:
        """What so many tokens of a line's field hold of its text."""
        text = line.text if self._spelled_mark is None else self._spelled_mark.sub(_broken, line.text)
        beginning = text[: CHARACTERS_PER_TOKEN * self._limits[line.field]]
        encoding = self._tokenizer.encode(beginning, add_special_tokens=False)
        ends = [end for id_, (_, end) in zip(encoding.ids, encoding.offsets, strict=True) if id_ not in self._mark_ids]
        end = ends[num_tokens - 1] if num_tokens else 0
        if num_tokens == len(ends) and len(beginning) == len(text):
            end = len(text)
        return PromptPart(line.field, text[:end].strip(), text[end:], num_tokens)

    def _check_special_tokens(self) -> None:
        """A chat token of another model would be spelled letter by letter, and the model would answer at random."""
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        named = {token for text in _template_texts(self.template) for token in _CHAT_TOKEN.findall(text)}
        if unknown := sorted(named - known):
            raise ConfigError(
                f"template: expected special tokens of the model's tokenizer, got {', '.join(unknown)}, which it does "
                "not have. Take the template of this model, or the model of this template."
            )

    def _check_room(self) -> None:
        required = {
            "prefix": (len(self._start_ids), prefix_lines(Query("", "", ""), self.template)),
            "suffix": (len(self._template(self.template.cue)), suffix_lines(Product(""), self.template)),
        }
        for name, (template, lines) in required.items():
            template += sum(len(self._template(line.start)) for line in lines)
            needed = template + sum(self._limits[line.field] for line in lines)
            if needed > self._limits[name]:
                fields = " + ".join(line.field for line in lines)
                raise ConfigError(
                    f"budgets: {name} is {self._limits[name]} tokens, but its template ({template} tokens) with "
                    f"{fields} needs {needed}. Raise {name} or lower the fields."
                )


def _template_texts(template: PromptTemplate) -> list[str]:
    """All texts that prompts take from a template, as they are tokenised."""
    query, product = Query("m", "l", "q", ("a", "b")), Product("t", "b", "c", {"n": "v"})
    lines = [*prefix_lines(query, template), *suffix_lines(product, template)]
    return [*(line.start for line in lines), template.cue]


def _is_mark(token: str) -> bool:
    """Whether an added token may mark structure, as `[control_8]` does. Words and single characters do not."""
    return len(token.strip(" \t\r\n▁")) > 1 and _MARK_CHARACTER.search(token) is not None


def _broken(mark: regex.Match[str]) -> str:
    """The text of a mark with a space in it, so that it is not that mark."""
    return f"{mark.group()[0]} {mark.group()[1:]}"


def _leading_special_ids(tokenizer: Tokenizer) -> list[int]:
    ids = tokenizer.encode("x", add_special_tokens=True).ids
    plain = tokenizer.encode("x", add_special_tokens=False).ids
    if not plain or plain[0] not in ids:
        return []
    return list(ids[: ids.index(plain[0])])
