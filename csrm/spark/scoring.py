"""Scores of pairs: one pandas operator for the scoring job, and a UDF for any DataFrame."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from py4j.protocol import Py4JError  # type: ignore[import-untyped]
from pyspark import TaskContext
from pyspark.resource import ResourceProfile
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.functions import arrow_udf

from csrm import errors
from csrm.artefacts.cache import pinned
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.conversions import NotConvertibleError, converted, found_in_arrow, is_kept, refusal
from csrm.errors import BundleError, CsrmError, InputError
from csrm.schemas import LABEL_PROBABILITIES, PAIR_KEY, SCORES_STAGING
from csrm.scoring.attempts import Attempts, open_attempts
from csrm.scoring.prompts import is_shown
from csrm.scoring.runtime import cpu_features
from csrm.scoring.scorer import OPTIONAL_COLUMNS, PAIR_COLUMNS, PairScorer, PreparedPairs
from csrm.spark.progress import ScoringProgress
from csrm.spark.workers import task_device

_PAIRS_PER_CALL = 1_024
_PREPARING_THREADS = 2
"""Most of preparing is tokenising, which needs no lock of Python's: two threads feed a GPU that is faster than one."""
_KEY_COLUMNS = [*PAIR_KEY, "pair_key"]


@dataclass(frozen=True)
class ScorerPlace:
    """Where pairs are scored, and with what."""

    bundle_dir: str
    """Folder of the bundle, the same path on every machine; or its URI."""
    device: str = "cpu"
    """cpu; cuda, which is the GPU that Spark gives the task, or the first one; or cuda:<number>."""
    threads: int = 1
    """Threads of one forward pass on the CPU."""
    tokens_per_call: int | None = None
    """Most tokens of one forward pass; None: see csrm.bundle.loading.TOKENS_PER_CALL."""
    profile: ResourceProfile | None = None
    """Resources of a task that scores; see scoring_profile."""

    def for_workers(self) -> "ScorerPlace":
        """The same without the profile, which belongs to the driver's JVM and cannot be sent."""
        return replace(self, profile=None)


@dataclass(frozen=True)
class ScorerInfo:
    """What a worker found when it loaded the bundle."""

    digest: str
    provider: str
    cpu_features: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def _loaded_scorer(bundle_dir: str, device: str, threads: int, tokens_per_call: int | None, digest: str) -> PairScorer:
    """Load once per Python worker process; Spark calls the operator many times in one.

    The digest is part of the key: workers outlive a bundle that is replaced at its path.

    Raises:
        BundleError: the bundle at the path has another digest.
    """
    scorer = load_scorer(bundle_dir, device, threads=threads, tokens_per_call=tokens_per_call)
    if scorer.digest != digest:
        raise BundleError(
            f"bundle {bundle_dir!r}: expected digest {digest}, this worker has {scorer.digest}. "
            "Put the same bundle on every machine, and leave it alone during a run."
        )
    return scorer


def _scorer_at(place: ScorerPlace, digest: str) -> PairScorer:
    """The scorer of this worker process; see _loaded_scorer."""
    device = task_device(place.device)
    return _loaded_scorer(place.bundle_dir, device, place.threads, place.tokens_per_call, digest)


def probe_scorer(spark: SparkSession, place: ScorerPlace) -> ScorerInfo:
    """Load the bundle in a worker, where the scores will be made, and say what it is.

    Raises:
        CsrmError: what loading raised there: BundleError, DeviceError, ...
    """
    here = place.for_workers()

    def probe(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for _ in batches:
            try:
                scorer = _scorer_at(here, load_bundle(here.bundle_dir).digest)
                found = (scorer.digest, scorer.provider, " ".join(cpu_features()), "", "")
            except CsrmError as error:
                found = ("", "", "", type(error).__name__, str(error))
            yield pd.DataFrame([found], columns=["digest", "provider", "cpu_features", "error", "message"])

    schema = "digest string, provider string, cpu_features string, error string, message string"
    row = spark.range(0, 1, 1, 1).mapInPandas(probe, schema, profile=place.profile).head()
    assert row is not None
    if row["error"]:
        raise getattr(errors, row["error"])(row["message"])
    return ScorerInfo(row["digest"], row["provider"], tuple(row["cpu_features"].split()))


def score_pair_batches(
    batches: Iterator[pd.DataFrame],
    scorer: PairScorer,
    on_scored: Callable[[int, int, int, int, int, int], None],
    attempts: Attempts | None = None,
    *,
    label_probabilities: bool = False,
) -> Iterator[pd.DataFrame]:
    """Scores of Arrow batches of pairs, or why they have none, in the order of their rows; tested without Spark.

    Args:
        batches: market, query_id, product_id, pair_key and PAIR_COLUMNS; pairs of one query best side by side.
        scorer: a loaded bundle.
        on_scored: called after each step of at most 1,024 pairs with the number of pairs, of tokens that were computed,
            of tokens of their prompts, whose prefixes are computed once a pack, of packs that had to be halved, of
            milliseconds that the scorer waited for pairs to be prepared (but for the first), and that it scored.
        attempts: of earlier processes that may have died at one of these pairs; None: there were none.
        label_probabilities: whether the probability of each label is wanted too.
    """
    steps = (
        batch.iloc[start : start + _PAIRS_PER_CALL].reset_index(drop=True)
        for batch in batches
        for start in range(0, len(batch), _PAIRS_PER_CALL)
    )
    try:
        ready = _prepared_ahead(steps, scorer) if attempts is None else ((step, None, 0.0) for step in steps)
        for pairs, prepared, waited_s in ready:
            before, start = np.array(_counts(scorer)), time.monotonic()
            if attempts is None:
                scores = scorer.score_or_reject(pairs, prepared, label_probabilities=label_probabilities)
            else:
                scores = attempts.score(scorer, pairs, label_probabilities=label_probabilities)
            times = [round(1000 * waited_s), round(1000 * (time.monotonic() - start))]
            on_scored(len(pairs), *[*(np.array(_counts(scorer)) - before).tolist(), *times])
            yield pd.concat([pairs[_KEY_COLUMNS], scores], axis=1)
    finally:
        if attempts is not None:
            attempts.close()


def _prepared_ahead(
    steps: Iterator[pd.DataFrame], scorer: PairScorer
) -> Iterator[tuple[pd.DataFrame, PreparedPairs | None, float]]:
    """Each step's pairs with their packs, which threads make while those before are scored: a GPU does not wait.

    None where they cannot be made: score_or_reject finds out why. And the seconds that it did wait, but for the first
    step's, behind which nothing can be scored.
    """
    with ThreadPoolExecutor(max_workers=_PREPARING_THREADS, thread_name_prefix="csrm-prepare") as pool:
        following = ((pairs, pool.submit(scorer.prepare, pairs)) for pairs in steps)
        waiting = deque(islice(following, 1))
        is_first = True
        while waiting:
            waiting.extend(islice(following, 1 + _PREPARING_THREADS - len(waiting)))
            pairs, preparing = waiting.popleft()
            start = time.monotonic()
            prepared = None if preparing.exception() else preparing.result()
            yield pairs, prepared, 0.0 if is_first else time.monotonic() - start
            is_first = False


def _counts(scorer: PairScorer) -> tuple[int, int, int]:
    return scorer.num_tokens, scorer.num_prompt_tokens, scorer.num_halved_packs


def with_relevance_score(
    pairs_df: DataFrame,
    place: ScorerPlace,
    *,
    bundle_digest: str,
    run_id: str,
    progress: ScoringProgress | None = None,
    attempts_dir: str | None = None,
    is_repeated: bool = False,
    label_probabilities: bool = False,
) -> DataFrame:
    """Pairs with their scores, or why they have none, as rows of scores_staging. One Python operator.

    Args:
        pairs_df: market, query_id, product_id, pair_key and PAIR_COLUMNS, laid out by with_scoring_layout.
        place: where they are scored.
        bundle_digest: digest that the bundle must have on every machine.
        run_id: run that scores.
        progress: counts what is scored; None where there are no accumulators (Spark Connect).
        attempts_dir: where attempts of the run note what they are at (see csrm.scoring.attempts); None: they do not.
        is_repeated: whether the run was started before. Else the first attempt of a task notes nothing.
        label_probabilities: whether the probability of each label is wanted too; else that column is null.
    """
    here = place.for_workers()
    counters = () if progress is None else progress.counters

    def on_scored(*counts: int) -> None:
        for counter, count in zip(counters, counts, strict=False):
            counter.add(count)

    def score(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        scorer = _scorer_at(here, bundle_digest)
        context = TaskContext.get()
        is_again = is_repeated or (context is not None and context.attemptNumber() > 0)
        attempts = open_attempts(attempts_dir) if is_again and attempts_dir is not None else None
        yield from score_pair_batches(batches, scorer, on_scored, attempts, label_probabilities=label_probabilities)

    schema = (
        "market string, query_id string, product_id string, pair_key bigint, "
        "relevance_score float, predicted_grade string, reason string"
    )
    column, none = LABEL_PROBABILITIES, {}
    if label_probabilities:
        schema += f", {column.name} {column.type}"
    else:
        none = {column.name: F.lit(None).cast(column.type)}
    return (
        pairs_df.select(*_KEY_COLUMNS, *[name for name in PAIR_COLUMNS if name not in _KEY_COLUMNS])
        .mapInPandas(score, schema, profile=place.profile)
        .withColumns(
            {
                "bundle_digest": F.lit(bundle_digest),
                "scored_at": F.current_timestamp(),
                "run_id": F.lit(run_id),
                **none,
            }
        )
        .select(*SCORES_STAGING.column_names)
    )


_FIELD_TYPES = dict.fromkeys(PAIR_COLUMNS, "string") | {
    "retrieved_titles": "array<string>",
    "attributes": "map<string,string>",
}


def relevance_score_udf(
    bundle_dir: str, device: str = "cpu", *, threads: int = 1, tokens_per_call: int | None = None
) -> Any:
    """UDF from a struct of PAIR_COLUMNS to the relevance score (float), for any DataFrame.

    Fields may come in any order; market, language, query and title must be there, the others may be absent. Their types
    convert as those of input tables do, see csrm.conversions. As in a night, a pair has no score, which is null here,
    where its query or its title is null or blank, or where the model fails on it; so it has where market, language or
    the whole struct is null.

    The UDF is marked non-deterministic so that Spark does not compute it twice where the plan uses it twice; Spark then
    refuses it inside of an aggregate: add the scores as a column first. It scores with the bundle that is at the path
    when it is made: after a bundle is replaced, make a new one. It works in streams and through Spark Connect too.

    Args:
        bundle_dir: folder of the bundle, the same path on every machine, or its URI.
        device: cpu; cuda, which is the GPU that Spark gives the task, or the first one; or cuda:<number>.
        threads: threads of one forward pass on the CPU, from 1.
        tokens_per_call: most tokens of one forward pass, from 1; None: 16,384 on a GPU and 1,024 on a CPU. Where memory
            does not suffice, shorter calls are made from then on.

    Returns:
        A function from a struct column to a column of floats in [0, 1] or null; spark.udf.register takes it too.

    Raises:
        BundleError: see load_bundle; in a worker also where its bundle is another one.
        InputError: the struct lacks fields, has unknown ones or ones of other types, or a value does not convert. The
            names of F.struct are checked where the function is called, the others in a worker.

    >>> score = relevance_score_udf("conf/demo_bundle")
    >>> columns = ["market", "language", "query", "title"]
    >>> pairs_df = spark.createDataFrame([("us", "en", "wireless mouse", "Silent Wireless Mouse 2.4G")], columns)
    >>> scored_df = pairs_df.withColumn("relevance_score", score(F.struct(*columns)))
    >>> [0 <= row["relevance_score"] <= 1 for row in scored_df.collect()]
    [True]
    """
    bundle_dir = pinned(str(bundle_dir))
    place, digest = ScorerPlace(bundle_dir, device, threads, tokens_per_call), load_bundle(bundle_dir).digest

    def score(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
        scorer = _scorer_at(place, digest)
        checked: pa.DataType | None = None
        for structs in batches:
            if isinstance(structs, tuple) or structs.type != checked:
                _check_fields(structs)
                checked = structs.type
            yield _scores_of(structs, scorer)

    udf = arrow_udf(score, "float").asNondeterministic()  # type: ignore[call-overload]

    @wraps(udf)
    def checked(*columns: Column | str) -> Column:
        if len(columns) != 1:
            raise InputError(
                f"relevance_score_udf: expected one struct, got {len(columns)} columns. {_WAY_OUT_OF_FIELDS}"
            )
        if (names := _struct_names(columns[0])) is not None and (problems := _problems_of_names(names)):
            raise InputError(_fields_message(problems))
        return udf(*columns)

    return checked


_WAY_OUT_OF_FIELDS = f"Pass F.struct of {PAIR_COLUMNS}, of which {OPTIONAL_COLUMNS} may be left out."


def _check_fields(structs: pa.Array | tuple[pa.Array, ...]) -> None:
    """Check the names and types of the UDF's fields, which hold for all its batches.

    Raises:
        InputError: some are wrong; all of them in one message.
    """
    if isinstance(structs, tuple) or not pa.types.is_struct(structs.type):
        got = f"{len(structs)} columns" if isinstance(structs, tuple) else str(structs.type)
        raise InputError(f"relevance_score_udf: expected one struct, got {got}. {_WAY_OUT_OF_FIELDS}")
    problems = _problems_of_names([field.name for field in structs.type])
    for field in structs.type:
        why = refusal(found_in_arrow(field.type), _FIELD_TYPES[field.name]) if field.name in _FIELD_TYPES else None
        if why is not None:
            problems.append(f"field {field.name!r}: {why}")
    if problems:
        raise InputError(_fields_message(problems))


def _problems_of_names(names: Sequence[str]) -> list[str]:
    missing = [name for name in PAIR_COLUMNS if name not in names and name not in OPTIONAL_COLUMNS]
    unknown = [name for name in names if name not in PAIR_COLUMNS]
    repeated = sorted({name for name in names if names.count(name) > 1})
    problems = [f"missing fields {missing}; the struct has {list(names)}"] if missing else []
    problems += [f"unknown fields {unknown}"] if unknown else []
    return problems + ([f"fields that are there twice: {repeated}"] if repeated else [])


def _fields_message(problems: Sequence[str]) -> str:
    return f"relevance_score_udf: {'; '.join(problems)}. {_WAY_OUT_OF_FIELDS}"


def _struct_names(column: Column | str) -> list[str] | None:
    """The names of a struct that F.struct has made of named columns; None where only the plan knows them."""
    try:
        node: Any = column._jc.node()  # type: ignore[operator, union-attr]
        if node.getClass().getSimpleName() != "UnresolvedFunction" or node.functionName() != "struct":
            return None
        arguments = [node.arguments().apply(place) for place in range(node.arguments().size())]
        return [_column_name(argument) for argument in arguments]
    except (AttributeError, TypeError, LookupError, Py4JError):  # Spark Connect, a name, or another Spark
        return None


def _column_name(node: Any) -> str:
    """Name of a column, as the plan has it.

    Raises:
        LookupError: only the plan knows it.
    """
    kind = node.getClass().getSimpleName()
    if kind == "Alias" and node.name().size() == 1:
        return str(node.name().head())
    if kind == "UnresolvedAttribute":
        return str(node.nameParts().last())
    raise LookupError(kind)


def _scores_of(structs: pa.StructArray, scorer: PairScorer) -> pa.Array:
    """The score of each struct; null where a night rejects the pair."""
    fields = dict(zip((field.name for field in structs.type), structs.flatten(), strict=True))
    columns = {name: _field_values(name, fields[name]) for name in PAIR_COLUMNS if name in fields}
    pairs = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    is_whole = [
        None not in (market, language) and is_shown(query) and is_shown(title)
        for market, language, query, title in zip(
            *(pairs[name] for name in ("market", "language", "query", "title")), strict=True
        )
    ]
    scores = np.full(len(pairs), np.nan, dtype=np.float32)
    if any(is_whole):
        scores[is_whole] = scorer.score_or_reject(pairs[is_whole].reset_index(drop=True))["relevance_score"]
    return pa.array(scores, pa.float32(), mask=np.isnan(scores))


def _field_values(name: str, values: pa.Array) -> list[Any]:
    """Values as those of input tables.

    Raises:
        InputError: a value does not convert.
    """
    found, wanted = found_in_arrow(values.type), _FIELD_TYPES[name]
    if is_kept(found, wanted):
        kept: list[Any] = values.to_pylist()
        return kept
    try:
        return [converted(value, found, wanted) for value in values.to_pylist()]
    except NotConvertibleError as error:
        raise InputError(f"relevance_score_udf: field {name!r}: {error}. Cast it to {wanted} first.") from error
