"""What is known of a translation step that has ended."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from csrm.training.translation import _known_quality
from csrm.training.translation_quality import TranslationQuality


@pytest.fixture
def quality() -> TranslationQuality:
    return TranslationQuality(num_texts=9, loss=1.5, loss_without_source=2.5, chrf=30.0)


def test_a_quality_that_was_cut_off_is_measured_again(tmp_path: Path, quality: TranslationQuality) -> None:
    path = tmp_path / "translation_quality.json"
    assert _known_quality(path, "a") is None
    text = json.dumps({"fingerprint": "a", "quality": asdict(quality)})
    path.write_text(text)
    assert _known_quality(path, "a") == quality
    assert _known_quality(path, "b") is None
    for other in (text[: len(text) // 2], "", "[]", json.dumps({"fingerprint": "a", "quality": {"of_before": 1}})):
        path.write_text(other)
        assert _known_quality(path, "a") is None, other
