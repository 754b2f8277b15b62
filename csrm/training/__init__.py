"""Training: from judged pairs and parallel text to a model; needs torch, transformers and peft (extra train).

Read settings, recipe and stage; then trainer, trained, tuning, targets and processes; then summary and report.
Its rooms are data, model and distillation. Export and the commands may import it. It never imports Spark.
"""
