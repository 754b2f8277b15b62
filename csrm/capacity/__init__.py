"""How long a night takes, what it needs, and what breaks first.

Read formula, figures (the numbers that it takes from a bundle and a run), search (by meaning), then report.
The commands may import it. It imports the bundle, the encoder and night's settings, and never Spark.
"""
