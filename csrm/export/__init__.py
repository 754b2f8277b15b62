"""From a trained model to a bundle, after proof that both score alike; needs extra export.

Read settings and bundle; weights, streamed, packed_onnx and graph_files, which carry a model to its graph one weight
at a time; then parity, precision, half, quality and trials; then vote, what scores beside the model.
The commands may import it. It imports training, and never Spark.
"""
