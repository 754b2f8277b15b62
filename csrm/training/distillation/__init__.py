"""Repairing noisy labels with models that were trained on other folds.

Read rounds, soft_labels, pseudo_labels and teacher_scores, then label_quality.
Training and the commands may import it.
"""
