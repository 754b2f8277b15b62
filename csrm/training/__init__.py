"""Training: from judged pairs and parallel text to a model; needs torch, transformers and peft (extra train).

Read settings and recipe; then its steps: checks, translation, relevance, results, summary and report. A step trains by
stage, which needs trainer, trained, tuning, targets and processes.
Its rooms are data, model and distillation. Export and the commands may import it. It never imports Spark.
"""
