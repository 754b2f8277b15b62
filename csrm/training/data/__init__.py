"""What a model is trained on, read with DuckDB.

Read database, judged (with pair_tables, judges, translated_rows and groups) and packs; then parallel_text, phrasebook
and title_pairs.
Training, export and the commands may import it. It imports scoring and ground files.
"""
