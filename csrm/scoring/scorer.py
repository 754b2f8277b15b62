"""From a frame of pairs to their relevance scores, whatever computes the logits."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from csrm.conversions import JSON, NotConvertibleError, converted
from csrm.errors import ConfigError, DeviceError, InputError
from csrm.scoring.labels import GradeCosts, Label, cost_matrix, expected_gain, least_cost, softmax
from csrm.scoring.packing import Group, Pack, build_packs
from csrm.scoring.prompts import Product, Query, is_shown
from csrm.scoring.tokenization import PromptTokenizer
from csrm.scoring.vote import Vote

logger = logging.getLogger(__name__)
PackScorer = Callable[[Pack], np.ndarray]
"""Logits of a pack's pairs, shape (pairs, labels), any float dtype."""
PAIR_COLUMNS = ["market", "language", "query", "retrieved_titles", "title", "brand", "category", "attributes"]
"""What a score depends on, apart from the bundle."""
OPTIONAL_COLUMNS = ["retrieved_titles", "brand", "category", "attributes"]
"""Those of PAIR_COLUMNS that a frame may leave out: the prompt then has no line for them."""
_PLACES_PER_TOKEN = 2
"""Places of a group index for each token of a call, at most: one long group behind many short ones pads all of them."""
CALLS_TO_GROW = 256
"""Calls without a failure after which halved calls grow again. The number doubles where fewer larger calls than these
succeed before one fails: growing was too early."""
TOKENIZER_ERROR, MODEL_ERROR, NOT_FINITE = "tokenizer_error", "model_error", "not_finite"
"""Reasons for which a pair has no score: its text cannot be tokenised, the model fails on it, or gives no numbers."""


class PreparedPairs(NamedTuple):
    """Pairs that are ready for the model."""

    packs: list[tuple[np.ndarray, Pack]]
    """Packs, each with the row numbers of its pairs."""


class _NotFiniteError(Exception):
    """A logit is no number."""


class PairScorer:
    """Scores pairs: prompts, tokens, packs, logits, expected gain.

    load_scorer makes one of a bundle. Any function from packs to logits makes one too; this one knows no answer:

    >>> from csrm.bundle import load_bundle
    >>> bundle = load_bundle("conf/demo_bundle")
    >>> def no_idea(pack):
    ...     return np.zeros((len(pack.last_index), len(bundle.settings.labels)))
    >>> scorer = PairScorer(bundle.prompt_tokenizer(), bundle.settings.labels, pack_scorer=no_idea, tokens_per_call=512)
    >>> pairs = pd.DataFrame({"market": "us", "language": "en", "query": "mouse", "title": ["Mouse Pad XL"]})
    >>> f"{scorer.score(pairs)['relevance_score'].item():.4f}"  # the mean gain of the four labels
    '0.2775'
    """

    def __init__(
        self,
        tokenizer: PromptTokenizer,
        labels: Sequence[Label],
        *,
        pack_scorer: PackScorer,
        tokens_per_call: int,
        digest: str = "",
        provider: str = "",
        grade_costs: GradeCosts | None = None,
    ) -> None:
        """Make a scorer.

        Args:
            tokenizer: of the model, with the budgets of its prompts.
            labels: answers of the model, in the order of its logits.
            pack_scorer: the model, see PackScorer.
            tokens_per_call: most tokens of one forward pass, which scores one pack; where a prompt may be longer, that
                many.
            digest: of the bundle; empty for a model that is not one.
            provider: name of what computes the logits.
            grade_costs: what mistakes of the predicted grade cost; None: it is the most probable label.

        Raises:
            ConfigError: tokens_per_call is below 1 or not whole; or see cost_matrix.
        """
        if not isinstance(tokens_per_call, int) or isinstance(tokens_per_call, bool) or tokens_per_call < 1:
            raise ConfigError(
                f"tokens_per_call: expected a whole number of tokens from 1, got {tokens_per_call!r}. Leave it out for "
                "the default of the device."
            )
        self.labels = tuple(labels)
        self._costs = None if grade_costs is None else cost_matrix(labels, grade_costs)
        self.digest = digest
        """Digest of the bundle; empty for a model that is not one."""
        self.provider = provider
        """What computes the logits, for example CPUExecutionProvider."""
        self.num_tokens = 0
        """Tokens computed so far, prefixes counted once per pack."""
        self.num_prompt_tokens = 0
        """Tokens of the prompts that were computed so far, prefixes counted once per pair."""
        self.num_halved_packs = 0
        """Forward passes so far that failed and whose halves did not: memory does not suffice for their size."""
        self.tokenizer = tokenizer
        """Of its prompts."""
        self.vote: Vote | None = None
        """What votes in each score beside the model; None: the model alone gives it."""
        self._pack_scorer = pack_scorer
        self._tokens_per_call = self._most_tokens = max(tokens_per_call, tokenizer.budgets.prompt)
        self._calls_to_grow = CALLS_TO_GROW
        self._calls_since_failure = 0
        """Calls since the last failure, or since calls grew."""
        self._grown_from: int | None = None
        """Most tokens of a call before calls grew; None: they have not grown since the last failure."""
        self._num_larger = 0
        """Calls since then that were larger."""
        self._known_good: tuple[Pack, np.ndarray] | None = None
        """The first pack that was scored, and its logits: what a healthy process gives again."""

    def score(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """Score pairs.

        Args:
            pairs: columns market, language, query and title (str or None), and those of OPTIONAL_COLUMNS that there
                are: retrieved_titles (sequence of str, best first), brand and category (str), attributes (mapping,
                sequence of (name, value), or JSON text); each may be None or NaN. Other values convert as in input
                tables, see csrm.conversions. Pairs of one query share their prefix wherever their rows stand.

        Returns:
            relevance_score (float32, in [0, 1]) and predicted_grade (str), on the index of `pairs`. NaN and None where
            a prompt has no query or no title to show: a night rejects such pairs.

        Raises:
            InputError: a column is missing, or a value is nothing that an input table may hold.
            ValueError: a logit is not finite (the message names the row).

        >>> from csrm.bundle import load_scorer
        >>> scorer = load_scorer("conf/demo_bundle", "cpu")
        >>> titles = ["Silent Wireless Mouse 2.4G", "Yoga Mat 6 mm"]
        >>> pairs = pd.DataFrame({"market": "us", "language": "en", "query": "wireless mouse", "title": titles})
        >>> scorer.score(pairs).round(2)
           relevance_score predicted_grade
        0             0.86               E
        1             0.00               I
        """
        scores, grades = self._graded(self.logits(pairs))
        has_nothing = ~(pairs["query"].map(_is_shown) & pairs["title"].map(_is_shown)).to_numpy(dtype=bool)
        scores[has_nothing], grades[has_nothing] = np.nan, None
        return pd.DataFrame({"relevance_score": scores, "predicted_grade": grades}, index=pairs.index)

    def score_parts(self, pairs: pd.DataFrame) -> np.ndarray:
        """Scores of pairs (see score), also of those that lack a query or a title: what a part of a prompt is worth.

        Returns:
            Shape (num_pairs,), float32, in [0, 1], in row order.
        """
        return self._graded(self.logits(pairs))[0]

    def votes(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """What each voter says of pairs (see score): the model's own score, and what stands beside it.

        Returns:
            model (float32, in [0, 1]), and where they vote words (share of the query's words that the product names)
            and encoder (cosine of query and title), float64; on the index of `pairs`.

        >>> from csrm.bundle import load_scorer
        >>> scorer = load_scorer("conf/demo_bundle", "cpu")
        >>> pairs = pd.DataFrame({"market": "us", "language": "en", "query": "wireless mouse", "title": ["Mouse Pad"]})
        >>> scorer.votes(pairs)["words"].tolist()
        [0.5]
        """
        scores = expected_gain(self._model_logits(pairs), np.array([label.gain for label in self.labels]))
        columns: dict[str, np.ndarray] = {"model": scores}
        if self.vote is not None:
            voters = self.vote.voters
            features = voters.features(scores, list(pair_texts(pairs)))
            columns |= {name: features[:, place] for place, name in enumerate(voters.names) if name != "model"}
        return pd.DataFrame(columns, index=pairs.index)

    def prepare(self, pairs: pd.DataFrame) -> PreparedPairs:
        """Tokens and packs of pairs, with which score and score_or_reject begin.

        Groups of about one length share a pack: its indexes then have little padding, and never more places than
        _PLACES_PER_TOKEN allows. Reads nothing that scoring changes but the size of packs: another thread may prepare
        the next pairs meanwhile.
        """
        groups, rows = pair_groups(pairs, self.tokenizer)
        rows_of_groups = _split(rows, [len(group.suffixes) for group in groups])
        order = sorted(range(len(groups)), key=lambda number: groups[number].num_tokens)
        most_tokens = self._tokens_per_call
        most_places = _PLACES_PER_TOKEN * most_tokens
        packs = list(build_packs([groups[number] for number in order], most_tokens, most_places=most_places))
        rows = np.concatenate([rows[:0], *(rows_of_groups[number] for number in order)])
        rows_of_packs = _split(rows, [len(pack.last_index) for pack in packs])
        return PreparedPairs(list(zip(rows_of_packs, packs, strict=True)))

    def score_or_reject(
        self, pairs: pd.DataFrame, prepared: PreparedPairs | None = None, *, label_probabilities: bool = False
    ) -> pd.DataFrame:
        """Score pairs, and set those aside that cannot be scored.

        Where a pack fails, its pairs are halved until those that fail are alone: for one such pair at most twice the
        logarithm of the pairs in a pack more forward passes, and one that shows that the process is healthy. Where all
        halves succeed, the pack was too large: later ones have half as many tokens, and grow again after CALLS_TO_GROW.

        Args:
            pairs: see score.
            prepared: of these pairs; None: they are prepared now.
            label_probabilities: whether the probability of each label is wanted too.

        Returns:
            relevance_score and predicted_grade as score gives them, NaN and None where there is a reason, and reason
            (TOKENIZER_ERROR, MODEL_ERROR or NOT_FINITE; None for a pair with a score), on the index of `pairs`. Where
            they are wanted, also label_probabilities: label to probability, None where there is a reason.

        Raises:
            InputError: a column is missing.
            DeviceError: a pack that was scored before fails too: the process is broken, not the pair.
        """
        pairs = with_pair_columns(pairs)
        logits = np.zeros((len(pairs), len(self.labels)), dtype=np.float32)
        reasons = np.full(len(pairs), None, dtype=object)
        self._try_rows(pairs, np.arange(len(pairs)), logits, reasons, prepared)
        if self.vote is not None:
            scored = np.flatnonzero([reason is None for reason in reasons])
            self._mix_rows(self.vote, pairs, scored, logits, reasons)
        scores, grades = self._graded(logits)
        is_rejected = np.array([reason is not None for reason in reasons], dtype=bool)
        scores[is_rejected], grades[is_rejected] = np.nan, None
        columns: dict[str, Any] = {"relevance_score": scores, "predicted_grade": grades, "reason": reasons}
        if label_probabilities:
            names = [label.name for label in self.labels]
            rows = zip(is_rejected, softmax(logits).tolist(), strict=True)
            columns["label_probabilities"] = pd.Series(
                [None if rejected else dict(zip(names, row, strict=True)) for rejected, row in rows],
                index=pairs.index,
                dtype=object,
            )
        return pd.DataFrame(columns, index=pairs.index)

    def logits(self, pairs: pd.DataFrame) -> np.ndarray:
        """Logits of the labels of pairs (see score), shape (num_pairs, num_labels), float32, in row order.

        Of the label tokens where the model alone scores; else logarithms of the label probabilities with the vote.
        """
        logits = self._model_logits(pairs)
        return logits if self.vote is None else self.vote.mixed(logits, list(pair_texts(pairs)))

    def _model_logits(self, pairs: pd.DataFrame) -> np.ndarray:
        """Of the model alone."""
        logits = np.empty((len(pairs), len(self.labels)), dtype=np.float32)
        for rows, pack in self.prepare(pairs).packs:
            logits[rows] = self._pack_logits(pack)
        return logits

    def _graded(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gains = np.array([label.gain for label in self.labels])
        names = np.array([label.name for label in self.labels], dtype=object)
        grades = logits.argmax(axis=1) if self._costs is None else least_cost(logits, self._costs)
        return expected_gain(logits, gains), names[grades]

    def _pack_logits(self, pack: Pack) -> np.ndarray:
        """Of the pairs in a pack, shape (num_pairs, num_labels)."""
        logits = self._pack_scorer(pack)
        self.num_tokens += len(pack.input_ids)
        self.num_prompt_tokens += int((pack.position_ids[pack.last_index] + 1).sum())
        self._calls_since_failure += 1
        self._num_larger += self._grown_from is not None and len(pack.input_ids) > self._grown_from
        if self._tokens_per_call < self._most_tokens and self._calls_since_failure >= self._calls_to_grow:
            self._grown_from, self._num_larger = self._tokens_per_call, 0
            self._tokens_per_call, self._calls_since_failure = min(2 * self._tokens_per_call, self._most_tokens), 0
            logger.info("calls of up to %d tokens again", self._tokens_per_call)
        if self._known_good is None and np.isfinite(logits).all():
            self._known_good = pack, logits
        return logits

    def _try_rows(
        self,
        pairs: pd.DataFrame,
        rows: np.ndarray,
        logits: np.ndarray,
        reasons: np.ndarray,
        prepared: PreparedPairs | None = None,
    ) -> None:
        """Fill in the logits of some rows of `pairs`, or their reasons."""
        try:
            packs = (prepared or self.prepare(pairs.iloc[rows])).packs
        except Exception as error:  # tokenizers raises Exception itself
            if len(rows) == 1:
                _reject(pairs, rows[0], TOKENIZER_ERROR, error, reasons)
            else:
                for half in np.array_split(rows, 2):
                    self._try_rows(pairs, half, logits, reasons)
            return
        for places, pack in packs:
            own = rows[places]
            try:
                found = self._pack_logits(pack)
                if not np.isfinite(found).all():
                    raise _NotFiniteError(f"logits are not finite: {found[:4].tolist()}")
                logits[own] = found
            except Exception as error:  # onnxruntime's errors have no common base
                if len(own) == 1:
                    self._require_health(error)
                    reason = NOT_FINITE if isinstance(error, _NotFiniteError) else MODEL_ERROR
                    _reject(pairs, own[0], reason, error, reasons)
                    continue
                for half in np.array_split(own, 2):
                    self._try_rows(pairs, half, logits, reasons)
                if all(reason is None for reason in reasons[own]):
                    self._ask_for_less(pack, error)

    def _mix_rows(
        self, vote: Vote, pairs: pd.DataFrame, rows: np.ndarray, logits: np.ndarray, reasons: np.ndarray
    ) -> None:
        """Mix the vote into the logits of some rows of `pairs`, or fill in their reasons.

        Raises:
            DeviceError: the encoder cannot embed what it could embed before.
        """
        try:
            logits[rows] = vote.mixed(logits[rows], list(pair_texts(pairs.iloc[rows])))
        except Exception as error:  # onnxruntime's errors have no common base
            if len(rows) > 1:
                for half in np.array_split(rows, 2):
                    self._mix_rows(vote, pairs, half, logits, reasons)
            elif vote.voters.is_healthy():
                _reject(pairs, rows[0], MODEL_ERROR, error, reasons)
            else:
                raise DeviceError(
                    f"the bundle's encoder: a text failed ({error}), and after it one that it embedded before: the "
                    "device or its driver is in a broken state. This process ends; Spark tries again in a fresh one."
                ) from error

    def _require_health(self, error: Exception) -> None:
        """Score the first pack again, which a healthy process can.

        Raises:
            DeviceError: what could be scored once can not be scored any more.
        """
        if self._known_good is None:
            raise error
        pack, expected = self._known_good
        try:
            is_healthy = np.allclose(self._pack_scorer(pack), expected, rtol=0.01, atol=0.01)
        except Exception:
            is_healthy = False
        if not is_healthy:
            raise DeviceError(
                f"{self.provider or 'the model'}: a pair failed ({error}), and after it pairs fail that were scored "
                "before: the device or its driver is in a broken state. This process ends; Spark tries again in a "
                "fresh one."
            ) from error

    def _ask_for_less(self, pack: Pack, error: Exception) -> None:
        """After a pack whose halves can be scored, as it is where memory runs out: shorter ones."""
        self.num_halved_packs += 1
        fewer = min(self._tokens_per_call, len(pack.input_ids) // 2)
        self._tokens_per_call = max(fewer, self.tokenizer.budgets.prompt)
        if self._grown_from is not None:
            was_too_early = self._num_larger < CALLS_TO_GROW
            self._calls_to_grow = 2 * self._calls_to_grow if was_too_early else CALLS_TO_GROW
            self._grown_from = None
        self._calls_since_failure = 0
        logger.warning("calls of at most %d tokens from now on; larger ones fail: %s", self._tokens_per_call, error)


def _is_shown(value: Any) -> bool:
    """Whether a prompt shows something of a query or title, of any type that pairs may hold."""
    return is_shown(value) if isinstance(value, str) else not bool(pd.isna(value))


def _split(rows: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """The rows, so many in each part."""
    ends = np.cumsum(counts, dtype=np.int64)
    return [rows[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _reject(pairs: pd.DataFrame, row: int, reason: str, error: Exception, reasons: np.ndarray) -> None:
    reasons[row] = reason
    query, title = pairs["query"].iloc[row], pairs["title"].iloc[row]
    logger.warning("rejected, %s: query %.80r, product %.80r: %.500s", reason, query, title, error)


def pair_groups(pairs: pd.DataFrame, tokenizer: PromptTokenizer) -> tuple[list[Group], np.ndarray]:
    """Pairs as one group for each distinct query, in order of first appearance.

    Returns:
        The groups, and the row number in `pairs` of each pair in the order of the groups, shape (num_pairs,), int64.
    """
    rows_of_query: dict[Query, list[int]] = {}
    products: list[Product] = []
    for row, (query, product) in enumerate(pair_texts(pairs)):
        rows_of_query.setdefault(query, []).append(row)
        products.append(product)
    suffixes = tokenizer.suffix_ids(products)
    prefixes = tokenizer.prefix_ids(list(rows_of_query))
    groups = [
        Group(prefix_ids, [suffixes[row] for row in rows])
        for prefix_ids, rows in zip(prefixes, rows_of_query.values(), strict=True)
    ]
    return groups, np.array([row for rows in rows_of_query.values() for row in rows], dtype=np.int64)


def with_pair_columns(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs with all of PAIR_COLUMNS: optional ones that are not there hold None.

    Returns:
        `pairs` itself where nothing is missing.

    Raises:
        InputError: market, language, query or title is missing.
    """
    absent = [name for name in PAIR_COLUMNS if name not in pairs.columns]
    if missing := [name for name in absent if name not in OPTIONAL_COLUMNS]:
        raise InputError(
            f"pairs: missing columns {missing}; there are {list(pairs.columns)}. Pass {PAIR_COLUMNS}, of which "
            f"{OPTIONAL_COLUMNS} may be left out."
        )
    return pairs.assign(**dict.fromkeys(absent)) if absent else pairs


def pair_texts(pairs: pd.DataFrame) -> Iterator[tuple[Query, Product]]:
    """What the prompt of each row says; see PairScorer.score for the columns.

    Raises:
        InputError: a column is missing, or a value is nothing that an input table may hold; the message names the row.
    """
    pairs = with_pair_columns(pairs)
    readers = [_READERS.get(name, _text) for name in PAIR_COLUMNS]
    for row, values in enumerate(zip(*(pairs[column] for column in PAIR_COLUMNS), strict=True)):
        fields = []
        for name, read, value in zip(PAIR_COLUMNS, readers, values, strict=True):
            try:
                fields.append(read(value))
            except NotConvertibleError as error:
                raise InputError(f"pairs: row {row}, column {name}: {error}.") from error
        market, language, query, titles, *product = fields
        yield Query(market, language, query, titles), Product(*product)


def _text(value: Any) -> str | None:
    """pandas marks a missing text as None or as NaN. Numbers become text as in tables."""
    if isinstance(value, str):
        return value
    return None if _is_missing(value) else converted(value, JSON, "string")


def _titles(value: Any) -> tuple[str | None, ...]:
    if _is_missing(value):
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (Sequence, np.ndarray)):
        raise NotConvertibleError(
            f"expected a list of text, got {type(value).__name__} {value!r:.80}. Put it in a list"
        )
    return tuple(map(_text, value))


def _mapping(value: Any) -> Mapping[str, str | None] | None:
    """Arrow gives a map as a list of (key, value)."""
    if _is_missing(value):
        return None
    if isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes)):
        try:
            value = dict(value)
        except (TypeError, ValueError) as error:
            raise NotConvertibleError(f"expected a map of text, got {value!r:.80}. Write a map of text") from error
    if isinstance(value, Mapping):
        if names := [name for name in value if not isinstance(name, str)]:
            raise NotConvertibleError(f"expected names that are text, got {names[0]!r:.80}. Write a map of text")
        if all(part is None or isinstance(part, str) for part in value.values()):
            return value
    attributes: Mapping[str, str | None] | None = converted(value, JSON, "map<string,string>")
    return attributes


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or value is pd.NaT or (isinstance(value, float) and value != value)


_READERS: dict[str, Callable[[Any], Any]] = {"retrieved_titles": _titles, "attributes": _mapping}
