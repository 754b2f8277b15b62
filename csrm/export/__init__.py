"""From a trained model to a bundle, after proof that both score alike; needs extra export.

Read settings, bundle and packed_onnx; then parity, precision, quality and trials.
The commands may import it. It imports training, and never Spark.
"""
