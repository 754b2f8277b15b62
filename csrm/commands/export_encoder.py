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
from csrm.schemas import CATALOG, QUERIES
from csrm.training.data.database import add_table, has_text, open_database


def main(argv: Sequence[str] | None = None) -> int:
    args = job_parser(__doc__, "conf/export_encoder.yaml").parse_args(argv)
    config = job_settings(args, EncoderExportConfig)
    start = time.monotonic()
    titles, queries = read_texts(config)
    export_encoder(config, titles, queries)
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
