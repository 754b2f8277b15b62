"""Every table that CSRM reads or writes, declared once: names, types, keys, comments and constraints.

Types are Spark SQL types. What a table means to its readers is in the comments, which the published tables carry.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    type: str
    comment: str
    required: bool = True
    """Input tables: the column must exist and its values must not be null. Outputs: NOT NULL."""


@dataclass(frozen=True)
class Table:
    """One table: its columns, the columns that identify a row, and what must hold for every row."""

    name: str
    comment: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    partition_by: tuple[str, ...] = ()
    checks: tuple[tuple[str, str], ...] = ()
    """Pairs of constraint name and SQL condition."""
    change_feed: bool = False
    schema_version: int = 1
    """Raised with every change of the columns; a table of an older version is refused until it is migrated."""

    @property
    def column_names(self) -> list[str]:
        return [column.name for column in self.columns]


MARKET = Column("market", "string", "Storefront, for example tw")
QUERY_ID = Column("query_id", "string", "Query's id, unique within its market")
PRODUCT_ID = Column("product_id", "string", "Product's id, unique within its market")
RUN_ID = Column("run_id", "string", "Run that wrote the row")
PAIR_KEY = ("market", "query_id", "product_id")
"""Columns that name a pair, in every table that has pairs."""

CATALOG = Table(
    name="catalog",
    comment="Products of each market",
    columns=(
        MARKET,
        PRODUCT_ID,
        Column("title", "string", "Product title as shown to shoppers", required=False),
        Column("brand", "string", "Brand name", required=False),
        Column("category", "string", "Category name or path", required=False),
        Column("attributes", "map<string,string>", "Attribute name to value", required=False),
        Column("language", "string", "Language of the text, BCP 47; the market's where null", required=False),
    ),
    key=("market", "product_id"),
)

QUERIES = Table(
    name="queries",
    comment="Search queries of each market",
    columns=(
        MARKET,
        QUERY_ID,
        Column("query", "string", "Query text as typed", required=False),
        Column("frequency", "bigint", "Searches in some period", required=False),
        Column("language", "string", "Language of the query, BCP 47; the market's where null", required=False),
    ),
    key=("market", "query_id"),
)

BEHAVIOUR = Table(
    name="behaviour",
    comment="What shoppers did after a query: clicks or purchases, summed over a period",
    columns=(
        MARKET,
        Column("query", "string", "Query text as typed"),
        PRODUCT_ID,
        Column("count", "bigint", "Clicks or purchases"),
    ),
    key=("market", "query", "product_id"),
)

RETRIEVAL_TABLE = Table(
    name="retrieval_table",
    comment="Product titles that augment a query, best first",
    columns=(
        MARKET,
        QUERY_ID,
        Column("rank", "int", "Place of the title for its query, from 1"),
        PRODUCT_ID,
        Column("title", "string", "Title that was retrieved"),
        Column("similarity", "double", "Strength relative to the query's strongest title of the same source, (0, 1]"),
        Column(
            "source",
            "string",
            "behaviour, lexical (by the query's words), translated (by their translations) or semantic (by an encoder)",
        ),
    ),
    key=("market", "query_id", "rank"),
    partition_by=("market",),
    checks=(
        ("rank_from_one", "rank >= 1"),
        ("similarity_range", "similarity > 0 AND similarity <= 1"),
        ("known_source", "source IN ('behaviour', 'lexical', 'translated', 'semantic')"),
    ),
    schema_version=2,
)

CANDIDATES = Table(
    name="candidates",
    comment="Pairs to score",
    columns=(
        MARKET,
        QUERY_ID,
        PRODUCT_ID,
        Column(
            "source",
            "string",
            "given, query (one of its best products), product (one of its best queries), translated or semantic (one "
            "of either, by translations of the query's words or by an encoder)",
            required=False,
        ),
    ),
    key=PAIR_KEY,
    partition_by=("market",),
)

JUDGMENTS = Table(
    name="judgments",
    comment="Human relevance labels",
    columns=(
        MARKET,
        QUERY_ID,
        PRODUCT_ID,
        Column("grade", "string", "Judged relevance: E, S, C, I, or a binary label such as yes and no"),
        Column("split", "string", "train, dev or test", required=False),
        Column("true_grade", "string", "The right grade where it is known; reported, never learnt", required=False),
    ),
    key=PAIR_KEY,
    partition_by=("market",),
)

JUDGED_LABELS = replace(
    JUDGMENTS,
    comment="Relevance labels as training and export read them: one row a pair, or one for each judge of a pair",
    columns=(
        *JUDGMENTS.columns,
        Column("judge", "string", "Who gave the grade: a person, a language model, a service", required=False),
        Column("weight", "double", "How much the grade counts, above 0; 1 where null", required=False),
    ),
    key=(*PAIR_KEY, "judge"),
)

COMPARED_SCORES = Table(
    name="compared_scores",
    comment="Scores of another ranker, bundle or night, to measure beside the published ones",
    columns=(
        MARKET,
        QUERY_ID,
        PRODUCT_ID,
        Column("score", "double", "Any number; a higher one is better, null is no score", required=False),
        Column("grade", "string", "Grade that the ranker gives the pair", required=False),
    ),
    key=PAIR_KEY,
)

PARALLEL_TEXT = Table(
    name="parallel_text",
    comment="Texts with their translations; each is learnt in both directions",
    columns=(
        Column("source_language", "string", "Language of source_text, BCP 47"),
        Column("target_language", "string", "Language of target_text, BCP 47"),
        Column("source_text", "string", "Text", required=False),
        Column("target_text", "string", "Its translation", required=False),
        Column("kind", "string", "query, title, attribute, taxonomy name or sentence", required=False),
        Column("split", "string", "train, dev or test; train where null", required=False),
    ),
    key=(),
)

TRANSLATED_TEXTS = Table(
    name="translated_texts",
    comment="Whole queries and product titles in other languages, by a person or a service: more rows to train on",
    columns=(
        MARKET,
        Column("kind", "string", "query or product"),
        Column("id", "string", "query_id or product_id"),
        Column("language", "string", "Language of the translation, BCP 47"),
        Column("text", "string", "The query or the title in that language; null where there is none", required=False),
    ),
    key=("market", "kind", "id", "language"),
)

UNCOVERED_PRODUCTS = Table(
    name="uncovered_products",
    comment="Products that no candidate pair with an existing query names, with the reason",
    columns=(
        MARKET,
        PRODUCT_ID,
        Column(
            "reason",
            "string",
            "no_title, no_shared_term (with any query, nor by translation), too_dissimilar or not_among_best",
        ),
    ),
    key=("market", "product_id"),
    partition_by=("market",),
)

TEXT_VECTORS = Table(
    name="text_vectors",
    comment="Vectors of texts, by the encoder that made them",
    columns=(
        Column("encoder_digest", "string", "sha256 that names the encoder"),
        Column("kind", "string", "passage (a product title) or query"),
        Column("text_sha256", "string", "sha256 of the text in UTF-8"),
        Column("vector", "array<float>", "As many numbers as the encoder has dimensions"),
    ),
    key=("encoder_digest", "kind", "text_sha256"),
    partition_by=("encoder_digest", "kind"),
    checks=(("known_kind", "kind IN ('passage', 'query')"),),
)

QUERY_TRANSLATIONS = Table(
    name="query_translations",
    comment="Queries of live markets in the language of a market that is to be opened",
    columns=(
        MARKET,
        QUERY_ID,
        Column("translation", "string", "The query in that language; null where there is none", required=False),
    ),
    key=("market", "query_id"),
)

LAUNCH_QUERIES = Table(
    name="launch_queries",
    comment="Queries of live markets, put into the language of a market; each text once. Columns as those of queries",
    columns=(
        MARKET,
        Column("query_id", "string", "Market it comes from, a colon, and its id there"),
        Column("query", "string", "The translation"),
        Column("frequency", "bigint", "Searches in the live markets", required=False),
        Column("language", "string", "Language of the translation, BCP 47"),
    ),
    key=("market", "query_id"),
    partition_by=("market",),
)

LAUNCH_FINDINGS = Table(
    name="launch_findings",
    comment="What a market lacks by its published scores, one row a query, term or product",
    columns=(
        MARKET,
        Column(
            "finding",
            "string",
            "query_without_good_product, query_all_foreign (its best titles), unknown_term (no title has it), "
            "product_unreached (no query has it as a good product); of queries of live markets: "
            "live_query_without_good_product, live_query_not_scored or live_query_untranslated",
        ),
        Column("origin", "string", "Market that the query comes from; else the market itself"),
        Column("item", "string", "Id of the query in its origin, id of the product, or the term"),
        Column("text", "string", "Query as it is asked here, product title, or a query with the term"),
        Column("language", "string", "Language of the query or product, in lower case", required=False),
        Column("category", "string", "Of the product, or of the query's best product", required=False),
        Column("searches", "bigint", "Searches of the query, or of all queries with the term", required=False),
        Column("score", "float", "Best published score; null where there is none", required=False),
    ),
    key=("market", "finding", "origin", "item"),
    partition_by=("market",),
)

_SCORE_CHECKS = (
    ("score_range", "relevance_score >= 0 AND relevance_score <= 1"),
    ("score_not_nan", "NOT isnan(relevance_score)"),
    (
        "probabilities",
        "label_probabilities IS NULL OR (array_min(map_values(label_probabilities)) >= 0 AND "
        "array_max(map_values(label_probabilities)) <= 1)",
    ),
)
"""Without `->`, which Delta's ADD CONSTRAINT writes as `- >`: so none holds the sum of probabilities."""
_SCORE_COLUMNS = (
    MARKET,
    QUERY_ID,
    PRODUCT_ID,
    Column("relevance_score", "float", "Expected gain of the pair under the model, in [0, 1]; higher is better"),
    Column("predicted_grade", "string", "Most probable label, or that of least expected cost"),
    Column("bundle_digest", "string", "sha256 that names the bundle which scored the pair"),
    Column("pair_key", "bigint", "Hash of everything that the score depends on"),
    Column("scored_at", "timestamp", "When the pair was scored, UTC"),
)
_SCORE_VALUES = ("relevance_score", "predicted_grade")
LABEL_PROBABILITIES = Column(
    "label_probabilities",
    "map<string,float>",
    "Label to its probability, all of them 1 together; null unless the night was asked for them",
    required=False,
)

RELEVANCE_SCORES = Table(
    name="relevance_scores",
    comment="Published relevance of (query, product) pairs, one row a pair",
    columns=(*_SCORE_COLUMNS, Column("run_id", "string", "Run that published the row"), LABEL_PROBABILITIES),
    key=PAIR_KEY,
    partition_by=("market",),
    checks=_SCORE_CHECKS,
    change_feed=True,
    schema_version=2,
)

SCORES_STAGING = Table(
    name="scores_staging",
    comment="Scores of runs, before their audit and publication, and the pairs that could not be scored",
    columns=(
        *(replace(column, required=column.name not in _SCORE_VALUES) for column in _SCORE_COLUMNS),
        Column("run_id", "string", "Run that scored the pair"),
        Column("reason", "string", "Why the pair has no score, as in rejected_pairs; null where it has one", False),
        LABEL_PROBABILITIES,
    ),
    key=("run_id", *PAIR_KEY),
    partition_by=("run_id", "market"),
    schema_version=3,
)

RUN_PAIRS = Table(
    name="run_pairs",
    comment="What each run made of every candidate pair",
    columns=(
        MARKET,
        QUERY_ID,
        PRODUCT_ID,
        Column(
            "pair_key", "bigint", "Hash of everything that the score depends on; null without a text", required=False
        ),
        Column(
            "state",
            "string",
            "unchanged (published with this key), staged (by a run that was not published), to_score, or rejected",
        ),
        Column("reason", "string", "Why the pair was rejected, as in rejected_pairs", required=False),
        Column("bucket", "int", "Part of the night; a chunk of work is a range of buckets"),
        RUN_ID,
    ),
    key=("run_id", *PAIR_KEY),
    partition_by=("run_id",),
)

REJECTED_PAIRS = Table(
    name="rejected_pairs",
    comment="Candidate pairs that could not be scored, with the reason",
    columns=(
        MARKET,
        QUERY_ID,
        PRODUCT_ID,
        Column(
            "reason",
            "string",
            "no_query, no_product, empty_query or empty_title; or found while scoring: tokenizer_error, model_error "
            "(the model fails on the pair), not_finite (its logits are no numbers) or process_died (at it, again and "
            "again)",
        ),
        RUN_ID,
    ),
    key=("run_id", *PAIR_KEY),
    partition_by=("run_id",),
)

SCORING_RUNS = Table(
    name="scoring_runs",
    comment="One row for each run of the scoring job, and for each rollback and retirement",
    columns=(
        RUN_ID,
        Column("data_date", "date", "Day whose inputs were scored; null: none were", required=False),
        Column("markets", "array<string>", "Markets that were scored, rolled back or retired, sorted"),
        Column("started_at", "timestamp", "Start of the last attempt, UTC"),
        Column("finished_at", "timestamp", "End, UTC; null while it runs, or where it died", required=False),
        Column(
            "verdict",
            "string",
            "running (or died), published, already_published, rejected, superseded, discarded, rolled_back, retired",
        ),
        Column("inputs", "map<string,string>", "Input table to its path, with @v and the version of a Delta table"),
        Column("bundle_digest", "string", "sha256 that names the bundle; null: nothing was scored", required=False),
        Column("precision", "string", "Precision of the bundle; null: nothing was scored", required=False),
        Column("device", "string", "Device and provider that scored; null: nothing did", required=False),
        Column("versions", "map<string,string>", "Package to version"),
        Column("num_candidates", "bigint", "Candidate pairs", required=False),
        Column("num_unchanged", "bigint", "Pairs whose published score was still right", required=False),
        Column("num_reused", "bigint", "Pairs that an earlier, unpublished attempt or run had scored", required=False),
        Column("num_scored", "bigint", "Pairs that this attempt scored", required=False),
        Column("rejected", "map<string,bigint>", "Reason to pairs that could not be scored", required=False),
        Column("changes", "map<string,bigint>", "insert, update, delete to published rows", required=False),
        Column("num_tokens", "bigint", "Tokens that were computed", required=False),
        Column("num_halved_packs", "bigint", "Packs for which the device's memory did not suffice", required=False),
        Column("seconds", "map<string,double>", "Stage to its wall-clock time in seconds"),
        Column(
            "audit",
            "string",
            "Audit results as JSON: a list of market, name, value, bound, passed, severity, sentence, accepted",
            required=False,
        ),
        Column("base_version", "bigint", "Version of relevance_scores that the run compared with", required=False),
        Column("published_version", "bigint", "Version of relevance_scores after this run", required=False),
        Column("table_id", "string", "Delta's id of relevance_scores, which its versions belong to", required=False),
        Column(
            "intervention",
            "map<string,string>",
            "Of a rollback rollback_to (the run whose state is back), of a retirement retired (the market) and reason; "
            "user, who did it. Null of a run of the scoring job",
            required=False,
        ),
    ),
    key=("run_id",),
    schema_version=5,
)

OUTPUTS = (
    RELEVANCE_SCORES,
    SCORES_STAGING,
    RUN_PAIRS,
    REJECTED_PAIRS,
    SCORING_RUNS,
    RETRIEVAL_TABLE,
    CANDIDATES,
    UNCOVERED_PRODUCTS,
    TEXT_VECTORS,
    LAUNCH_QUERIES,
    LAUNCH_FINDINGS,
)
"""Tables that CSRM writes."""
