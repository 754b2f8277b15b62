"""Export a text encoder for ONNX Runtime, after proof that it gives the model's vectors.

python export/export_encoder.py --config conf/export_encoder.yaml
"""

import tempfile
import time
from collections.abc import Sequence

from csrm.cli import job_parser, job_settings
from csrm.embedding.card import encoder_card
from csrm.errors import InputError
from csrm.export.encoder import EncoderExportConfig, export_encoder
from csrm.export.encoder_precision import JudgedTexts
from csrm.schemas import CATALOG, JUDGMENTS, QUERIES
from csrm.training.data.database import add_table, has_text, literal, open_database


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__, "conf/export_encoder.yaml").parse_args(argv)
    config = job_settings(args, EncoderExportConfig)
    start = time.monotonic()
    titles, queries = read_texts(config)
    judged = None if config.precision == "fp32" else read_judged(config)
    export_encoder(config, titles, queries, judged)
    num_texts = len(titles) + len(queries)
    seconds = time.monotonic() - start
    print(f"{encoder_card(config.encoder_dir)}\n\nproven on {num_texts} texts; exported in {seconds:.0f} s")
    return 0


def read_texts(config: EncoderExportConfig) -> tuple[list[str], list[str]]:
    """Titles and queries for the proof: some of all, chosen by a hash of the text.

    Raises:
        InputError: a table cannot be read, or has no text.
    """
    tables = ((CATALOG, config.inputs.catalog, "title"), (QUERIES, config.inputs.queries, "query"))
    found = []
    with tempfile.TemporaryDirectory(prefix="csrm-encoder-texts-") as folder, open_database(folder) as database:
        for table, spec, column in tables:
            add_table(database, table, spec)
            rows = database.execute(
                f"SELECT DISTINCT {column} FROM {table.name} WHERE {has_text(column)} "
                f"ORDER BY md5({column}) LIMIT {config.parity_texts}"
            ).fetchall()
            if not rows:
                raise InputError(f"input {table.name} at {spec.path!r}: expected texts in column {column}, got none.")
            found.append([text for (text,) in rows])
    return found[0], found[1]


def read_judged(config: EncoderExportConfig) -> JudgedTexts:
    """Judged queries with a relevant title, and titles to search: theirs, and others chosen by a hash of the text.

    Raises:
        InputError: a table cannot be read, or no judged query has a relevant title.
    """
    assert config.inputs.judgments is not None
    tables = {CATALOG: config.inputs.catalog, QUERIES: config.inputs.queries, JUDGMENTS: config.inputs.judgments}
    grades = ", ".join(map(literal, config.relevant_grades)) or "NULL"
    with tempfile.TemporaryDirectory(prefix="csrm-encoder-judged-") as folder, open_database(folder) as database:
        for table, spec in tables.items():
            add_table(database, table, spec)
        pairs = database.execute(
            f"""
            WITH relevant AS (
                SELECT DISTINCT market, query, title
                FROM judgments JOIN queries USING (market, query_id) JOIN catalog USING (market, product_id)
                WHERE grade IN ({grades}) AND {has_text("query")} AND {has_text("title")}
            ), chosen AS (
                SELECT DISTINCT market, query FROM relevant ORDER BY md5(query), market LIMIT {config.judged_queries}
            )
            SELECT market, query, title FROM relevant JOIN chosen USING (market, query) ORDER BY ALL
            """
        ).fetchall()
        others = database.execute(
            f"SELECT DISTINCT market, title FROM catalog WHERE {has_text('title')} "
            f"ORDER BY md5(title), market LIMIT {config.judged_titles}"
        ).fetchall()
    if not pairs:
        raise InputError(
            f"input judgments at {config.inputs.judgments.path!r}: expected pairs of the grades "
            f"{list(config.relevant_grades)} whose query and title have a text, got none. Is 'relevant_grades' right?"
        )
    markets = {market for market, _, _ in pairs}
    own = list(dict.fromkeys((market, title) for market, _, title in pairs))
    known = set(own)
    rest = [(market, title) for market, title in others if market in markets and (market, title) not in known]
    titles = own + rest[: max(0, config.judged_titles - len(own))]
    places = {title: place for place, title in enumerate(titles)}
    relevant: dict[tuple[str, str], set[int]] = {}
    for market, query, title in pairs:
        relevant.setdefault((market, query), set()).add(places[market, title])
    return JudgedTexts(list(relevant), titles, list(relevant.values()))
