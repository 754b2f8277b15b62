import pytest

from csrm.errors import ConfigError
from csrm.scoring.labels import BINARY_LABELS, ESCI_LABELS
from csrm.start.grades import propose_grades


def test_esci_letters_and_words_have_their_usual_gains() -> None:
    letters = propose_grades(["E", "S", "C", "I"], {})
    assert (letters.labels, letters.grade_labels) == (ESCI_LABELS, None)
    assert letters.gains == {"I": 0.0, "C": 0.01, "S": 0.1, "E": 1.0}
    words = propose_grades(["Exact", "Irrelevant", "Substitute"], {})
    assert words.labels == ESCI_LABELS
    assert words.grade_labels == {"Exact": "E", "Irrelevant": "I", "Substitute": "S"}
    assert (words.relevant, words.irrelevant) == (["Exact"], ["Irrelevant"])


@pytest.mark.parametrize("grades", [["no", "yes"], ["0", "1"], ["irrelevant", "Relevant"]])
def test_two_grades_are_relevant_or_not(grades: list[str]) -> None:
    proposal = propose_grades(grades, {})
    assert proposal.labels == BINARY_LABELS
    assert (proposal.irrelevant, proposal.relevant) == (grades[:1], grades[1:])
    assert proposal.grade_labels == (None if grades == ["no", "yes"] else dict(zip(grades, ["no", "yes"], strict=True)))


def test_numbers_are_ordered_with_exponential_gains() -> None:
    proposal = propose_grades(["3", "1", "2", "0"], {})
    assert proposal.gains == {"0": 0.0, "1": 0.1429, "2": 0.4286, "3": 1.0}
    assert [label.name for label in proposal.labels] == ["0", "1", "2", "3"]
    assert [label.token for label in proposal.labels] == [" no", " goes", " similar", " yes"]
    assert list(propose_grades(["1", "2", "3", "4", "5"], {}).gains) == ["1", "2", "3", "4", "5"]


def test_other_grades_need_their_gains() -> None:
    with pytest.raises(ConfigError, match=r"\['bad', 'good', 'ok'\] have no meaning .* --grades bad=GAIN,good=GAIN"):
        propose_grades(["good", "bad", "ok"], {})
    proposal = propose_grades(["good", "bad", "ok"], {"good": 1.0, "bad": 0.0, "ok": 0.3})
    assert proposal.gains == {"bad": 0.0, "ok": 0.3, "good": 1.0}
    assert [(label.name, label.token) for label in proposal.labels] == [
        *(("bad", " no"), ("ok", " similar")),
        ("good", " yes"),
    ]


@pytest.mark.parametrize(
    ("grades", "given", "message"),
    [
        (["E"], {}, r"expected two grades or more, got \['E'\]"),
        (["a", "b"], {"a": 1.0}, r"lacks the grades \['b'\]"),
        (["a", "b"], {"a": 1.0, "b": 7.0}, "gains from 0 to 1"),
        (["0", "1", "1.0"], {}, "have no meaning that is known"),
        (["0", "nan", "inf"], {}, "have no meaning that is known"),
        (["1_0", "2"], {}, "have no meaning that is known"),
        ([str(number) for number in range(11)], {}, "have no meaning that is known"),
    ],
)
def test_what_a_model_cannot_answer_is_refused(grades: list[str], given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        propose_grades(grades, given)
