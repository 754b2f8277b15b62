"""Training targets: distributions over the labels."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from csrm.errors import InputError
from csrm.scoring.labels import Label


def one_hot_targets(
    grades: pd.Series, labels: Sequence[Label], grade_labels: Mapping[str, str] | None, column: str = "grade"
) -> np.ndarray:
    """A distribution over the labels for each grade, all on its own label: shape (num_pairs, num_labels), float32.

    Args:
        grades: null for a random negative, whose label is the one of least gain.
        grade_labels: grade to label name; None where the labels are named as the grades.
        column: of the judgments, where the grades come from; for messages.

    Raises:
        InputError: a grade has no label.
    """
    number = {label.name: index for index, label in enumerate(labels)}
    names = grades.map(grade_labels) if grade_labels is not None else grades
    least = min(range(len(labels)), key=lambda index: labels[index].gain)
    targets = names.map(number).where(grades.notna(), least)
    unknown = sorted(set(grades[targets.isna()].astype(str)))
    if unknown:
        raise InputError(
            f"judgments: {column}s {unknown} have no label; labels are {sorted(number)}, grade_labels {grade_labels}. "
            "Name them in the config under grade_labels."
        )
    one_hot: np.ndarray = np.eye(len(labels), dtype=np.float32)[targets.to_numpy(dtype=np.int64)]
    return one_hot


def voted_targets(
    grades: pd.Series, votes: pd.Series, labels: Sequence[Label], grade_labels: Mapping[str, str] | None
) -> np.ndarray:
    """Distributions over the labels: the shares of the judges' grades where these differ, else all on the one grade.

    Args:
        grades: see one_hot_targets.
        votes: grade and share of each, which sum to 1, as a list of two; null where judges agree.
        labels: see one_hot_targets.
        grade_labels: see one_hot_targets.

    Returns:
        Shape (num_pairs, num_labels), float32.

    Raises:
        InputError: see one_hot_targets.
    """
    targets = one_hot_targets(grades, labels, grade_labels)
    for place in np.flatnonzero(votes.notna()):
        voted, shares = zip(*votes.iloc[place], strict=True)
        targets[place] = np.array(shares) @ one_hot_targets(pd.Series(voted), labels, grade_labels)
    return targets


def smoothed_targets(targets: np.ndarray, label_smoothing: float) -> np.ndarray:
    """Distributions with a share of each spread evenly over the labels; shape (num_pairs, num_labels), as given."""
    smoothed: np.ndarray = (1 - label_smoothing) * targets + label_smoothing / targets.shape[1]
    return smoothed.astype(targets.dtype)
