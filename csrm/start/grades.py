"""What the grades of judgments mean: labels that a model answers with, their gains, and what counts as relevant."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from csrm.errors import ConfigError
from csrm.scoring.labels import BINARY_LABELS, ESCI_LABELS, Label

_ESCI_NAMES = {"exact": "E", "substitute": "S", "complement": "C", "irrelevant": "I"}
_BINARY_NAMES = {"yes": "yes", "no": "no", "1": "yes", "0": "no", "true": "yes", "false": "no"} | {
    "relevant": "yes",
    "irrelevant": "no",
    "not relevant": "no",
}
_TOKENS = {
    2: (" no", " yes"),
    3: (" no", " similar", " yes"),
    4: (" no", " goes", " similar", " yes"),
    5: (" no", " goes", " similar", " likely", " yes"),
}
"""Number of labels to the answers of a model, least relevant first; words that large vocabularies hold as one token."""
MOST_GRADES = max(_TOKENS)


@dataclass(frozen=True)
class Grades:
    """The grades of a table of judgments."""

    labels: tuple[Label, ...]
    """Answers of the model, least relevant first."""
    grade_labels: Mapping[str, str] | None
    """Grade to the name of its label; None where both have the same names."""
    gains: Mapping[str, float]
    """Grade to its gain, in [0, 1]."""
    why: str

    @property
    def relevant(self) -> list[str]:
        """Grades of the largest gain."""
        return [grade for grade, gain in self.gains.items() if gain == max(self.gains.values())]

    @property
    def irrelevant(self) -> list[str]:
        """Grades of the least gain."""
        return [grade for grade, gain in self.gains.items() if gain == min(self.gains.values())]


def propose_grades(grades: Collection[str], given: Mapping[str, float]) -> Grades:
    """What grades mean: as a person said, else by their names (ESCI, yes and no), else by their order as numbers.

    >>> propose_grades(["0", "1", "2"], {}).gains
    {'0': 0.0, '1': 0.3333, '2': 1.0}

    Args:
        grades: all that occur, at least two.
        given: grade to its gain.

    Raises:
        ConfigError: their meaning is not known, or there are too many.
    """
    if given:
        return _given(grades, given)
    if len(grades) < 2:
        raise ConfigError(f"judgments: expected two grades or more, got {sorted(grades)}: a model would learn nothing.")
    names = {grade: grade.strip().lower() for grade in grades}
    esci = {grade: _ESCI_NAMES.get(name, name.upper()) for grade, name in names.items()}
    if set(esci.values()) <= {label.name for label in ESCI_LABELS} and len(set(esci.values())) == len(grades) > 1:
        is_binary = set(names.values()) <= set(_BINARY_NAMES)
        if not is_binary:
            return _of_labels(esci, ESCI_LABELS, "ESCI, with its usual gains")
    binary = {grade: _BINARY_NAMES.get(name, "") for grade, name in names.items()}
    if sorted(binary.values()) == ["no", "yes"]:
        return _of_labels(binary, BINARY_LABELS, "relevant or not")
    ordered = _by_number(grades)
    if 2 <= len(ordered) <= MOST_GRADES:
        most = 2 ** (len(ordered) - 1) - 1
        gains = {grade: round((2**place - 1) / most, 4) for place, grade in enumerate(ordered)}
        return _of_gains(gains, "by their order as numbers, with exponential gains")
    raise ConfigError(
        f"judgments: the grades {sorted(grades)} have no meaning that is known. Say the gain of each, 0 to 1: --grades "
        + ",".join(f"{grade}=GAIN" for grade in sorted(grades)[: MOST_GRADES + 1])
    )


def _by_number(grades: Collection[str]) -> list[str]:
    """Grades in the order of their numbers; none where one is no number, or two are the same one, such as 1 and 1.0."""
    if not all(re.fullmatch(r"\s*[+-]?\d+(\.\d*)?\s*", grade, re.ASCII) for grade in grades):
        return []
    numbers = {float(grade) for grade in grades}
    return sorted(grades, key=float) if len(numbers) == len(grades) else []


def _given(grades: Collection[str], given: Mapping[str, float]) -> Grades:
    if missing := sorted(set(grades) - set(given)):
        raise ConfigError(f"--grades: lacks the grades {missing} of the judgments; it has {sorted(given)}.")
    if not all(0 <= gain <= 1 for gain in given.values()) or not 2 <= len(given) <= MOST_GRADES:
        raise ConfigError(f"--grades: expected 2 to {MOST_GRADES} grades with gains from 0 to 1, got {dict(given)}.")
    return _of_gains(dict(sorted(given.items(), key=lambda pair: pair[1])), "as you said")


def _of_gains(gains: Mapping[str, float], why: str) -> Grades:
    """Labels that are called as their grades; gains come least first."""
    labels = tuple(
        Label(grade, token, gain) for (grade, gain), token in zip(gains.items(), _TOKENS[len(gains)], strict=True)
    )
    return Grades(labels, None, gains, why)


def _of_labels(named: Mapping[str, str], labels: tuple[Label, ...], why: str) -> Grades:
    """Grades that stand for known labels."""
    gain_of = {label.name: label.gain for label in labels}
    gains = dict(sorted(((grade, gain_of[name]) for grade, name in named.items()), key=lambda pair: pair[1]))
    same = all(grade == name for grade, name in named.items())
    return Grades(labels, None if same else dict(named), gains, why)
