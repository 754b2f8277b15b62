"""Which products belong to a query before any score: titles for its prompt, and pairs to score.

Read lexical (BM25), translations (words across languages), vectors, nearest, expansion and semantic (meaning), titles
(the retrieval table), then candidates.
Operations and the commands may import it. It imports the platform (spark) and ground files.
"""
