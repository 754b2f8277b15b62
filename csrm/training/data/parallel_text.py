"""Parallel text: what is learnt from it, what is left out, and how well it was learnt."""

import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain, islice

import regex

from csrm.config import InputSpec
from csrm.errors import InputError
from csrm.schemas import PARALLEL_TEXT
from csrm.scoring.prompts import Translation
from csrm.text import has_text, text_key
from csrm.training.data.database import add_table, literal, open_database

NEAR_COPY_SHARE = 0.2
"""Texts that differ in at most this share of their UTF-8 bytes are near-copies (Levenshtein distance to the longer)."""
_OTHER_SCRIPTS = {
    "ko": r"[\p{Hiragana}\p{Katakana}]",
    "zh": r"[\p{Hangul}\p{Hiragana}\p{Katakana}]",
    "ja": r"\p{Hangul}",
}
_SCRIPTS = {"ko": r"\p{Hangul}", "zh": r"\p{Han}", "ja": r"[\p{Han}\p{Hiragana}\p{Katakana}]"}
_LATIN = ("en", "es", "fr", "de", "pt", "it", "nl", "id", "vi", "pl", "cs", "da", "sv", "fi", "nb", "tr", "hu", "ro")
_SIDES = [f"concat_ws(' ', {side}_language, text_key({side}_text))" for side in ("source", "target")]
_PAIR_OF_TEXTS = f"md5_number_lower(concat(least({', '.join(_SIDES)}), ' ', greatest({', '.join(_SIDES)})))"
"""SQL: the same for both directions, and for texts that are the same text."""
_TEXTS_AT_ONCE = 1_024
_COMPARED_CHARACTERS = 256


class ParallelText:
    """Texts of a `parallel_text` table and how many of them were left out, by reason."""

    def __init__(self, spec: InputSpec) -> None:
        self._spec = spec
        self.num_kept = 0
        """Pairs of texts of the split that was read last."""
        self.num_left_out: Counter[str] = Counter()
        """Reason to pairs of texts, of the split that was read last; see why_left_out."""

    def translations(self, split: str, seed: int, repeat: bool = False) -> Iterator[list[Translation]]:
        """Both directions of the pairs of texts of a split, in batches, in random order.

        Args:
            split: which; pairs without a split are in train.
            seed: of the order.
            repeat: start again at the end, without end.

        Raises:
            InputError: the table cannot be read, has problems, or has nothing to learn from in this split.
        """
        while True:
            yield from self._one_pass(split, seed)
            if not self.num_kept:
                raise InputError(
                    f"parallel_text {self._spec.path!r}: expected texts of split {split!r} to learn from, got none; "
                    f"left out: {dict(self.num_left_out) or 'none'}. Is the split right?"
                )
            if not repeat:
                return
            seed += 1

    def first(self, split: str, seed: int, most: int) -> list[Translation]:
        """The first of translations(split, seed), at most so many, without pairs of texts that split train has too.

        A pair counts in either direction.
        """
        with closing(self._one_pass(split, seed, without="train")) as batches:
            return list(islice(chain.from_iterable(batches), most))

    def _one_pass(self, split: str, seed: int, without: str | None = None) -> Generator[list[Translation], None, None]:
        self.num_kept, self.num_left_out = 0, Counter()
        with tempfile.TemporaryDirectory(prefix="csrm-parallel-text-") as folder, open_database(folder) as database:
            add_table(database, PARALLEL_TEXT, self._spec)
            chosen = "parallel_text WHERE coalesce(split, 'train') = $split"
            if without is not None:
                chosen = f"""(SELECT *, {_PAIR_OF_TEXTS} AS pair FROM {chosen}) ANTI JOIN (
                    SELECT {_PAIR_OF_TEXTS} AS pair FROM parallel_text
                    WHERE coalesce(split, 'train') = {literal(without)}
                ) USING (pair)"""
            both = f"""
                SELECT source_language, target_language, source_text, target_text, is_near_copy, copy FROM (
                    SELECT *,
                        left(text_key(source_text), $compared) AS source_start,
                        left(text_key(target_text), $compared) AS target_start,
                        levenshtein(source_start, target_start)
                            <= $near * greatest(strlen(source_start), strlen(target_start)) AS is_near_copy,
                        row_number() OVER (
                            PARTITION BY source_language, target_language, source_text, target_text
                        ) AS copy
                    FROM {chosen}
                )
            """
            rows = database.sql(
                f"""
                SELECT * FROM ({both}), (VALUES (false), (true)) AS directions(reversed)
                ORDER BY md5(
                    concat_ws(' ', {seed}, source_language, target_language, source_text, target_text, reversed)
                )
                """,
                params={"split": split, "near": NEAR_COPY_SHARE, "compared": _COMPARED_CHARACTERS},
            )
            kept = (
                Translation(target, source, target_text, source_text)
                if is_reversed
                else Translation(source, target, source_text, target_text)
                for batch in rows.to_arrow_reader(_TEXTS_AT_ONCE)
                for source, target, source_text, target_text, is_near_copy, copy, is_reversed in zip(
                    *(column.to_pylist() for column in batch.columns), strict=True
                )
                if self._is_kept(
                    Translation(source, target, source_text, target_text), is_near_copy, copy > 1, is_reversed
                )
            )
            while texts := list(islice(kept, _TEXTS_AT_ONCE)):
                yield texts

    def _is_kept(self, text: Translation, is_near_copy: bool | None, is_repeated: bool, is_reversed: bool) -> bool:
        reason = "repeated" if is_repeated else why_left_out(text, bool(is_near_copy))
        if not is_reversed:  # count each pair of texts once
            if reason:
                self.num_left_out[reason] += 1
            else:
                self.num_kept += 1
        return reason is None


def why_left_out(text: Translation, is_near_copy: bool) -> str | None:
    """Why nothing can be learnt from a translation, None where something can: empty, copy, near_copy, wrong_script."""
    source, target = text.source_text or "", text.target_text or ""
    if not has_text(source) or not has_text(target):
        return "empty"
    if text_key(source) == text_key(target):
        return "copy"
    if is_near_copy:
        return "near_copy"
    if not (is_in_script(source, text.source_language) and is_in_script(target, text.target_language)):
        return "wrong_script"
    return None


def is_in_script(text: str, language: str) -> bool:
    """Whether a text has a letter of its language's script and none of a script that the language never uses.

    Names in Latin letters may stand in any text. Languages whose script is not known here always pass.
    """
    code = language.split("-")[0].lower()
    if code in _SCRIPTS:
        return bool(regex.search(_SCRIPTS[code], text)) and not regex.search(_OTHER_SCRIPTS[code], text)
    if code in _LATIN:
        return bool(regex.search(r"\p{Latin}", text)) and not regex.search(
            r"[\p{Han}\p{Hangul}\p{Hiragana}\p{Katakana}]", text
        )
    return True
