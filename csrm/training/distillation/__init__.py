"""Repairing noisy labels with models that were trained on other folds.

Read rounds, soft_labels and pseudo_labels, then label_quality; teacher and label_map are a way of their own.
Training and the commands may import it.
"""
