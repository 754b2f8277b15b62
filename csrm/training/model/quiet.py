"""Libraries that draw bars and warn where a job's own lines should stand."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch.jit._trace import TracerWarning
from tqdm import tqdm
from transformers import modeling_gguf_pytorch_utils as gguf_loading
from transformers.utils import logging as transformers_logging

_EXPECTED = "Could not find a config file in"
"""Of peft, which looks beside the base model for a vocabulary that may have grown; ours never does."""


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """A block without the libraries' expected warnings and, where stderr is no terminal, without their bars."""
    shown, bar = transformers_logging.is_progress_bar_enabled(), gguf_loading.tqdm
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
        gguf_loading.tqdm = partial(tqdm, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_EXPECTED)
            warnings.filterwarnings("ignore", category=TracerWarning)
            yield
    finally:
        gguf_loading.tqdm = bar
        if shown:
            transformers_logging.enable_progress_bar()
