"""What a model is trained on, read with DuckDB.

Read database, judged and packs; then parallel_text, phrasebook and title_pairs.
Training, export and the commands may import it. It imports scoring and ground files.
"""
