import sys
import warnings

import pytest
import torch
from transformers import modeling_gguf_pytorch_utils as gguf_loading
from transformers.utils import logging as transformers_logging

from csrm.training.model.quiet import quiet_libraries


def test_bars_of_libraries_are_drawn_for_terminals_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = gguf_loading.tqdm
    with quiet_libraries():
        assert list(gguf_loading.tqdm([1, 2], desc="Converting")) == [1, 2]
        assert not transformers_logging.is_progress_bar_enabled()
    assert capsys.readouterr().err == ""
    assert gguf_loading.tqdm is bar
    assert transformers_logging.is_progress_bar_enabled()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with quiet_libraries():
        assert gguf_loading.tqdm is bar


def test_expected_warnings_are_left_out_and_others_are_not() -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with quiet_libraries():
            warnings.warn("Could not find a config file in x", stacklevel=2)
            warnings.warn(torch.jit.TracerWarning("Converting a tensor to a Python boolean"), stacklevel=2)
            warnings.warn("something else", stacklevel=2)
    assert [str(warning.message) for warning in said] == ["something else"]
