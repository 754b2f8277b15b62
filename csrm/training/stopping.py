"""A training that a signal stops: it ends after its step, whose checkpoint is kept."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from csrm.errors import StoppedError
from csrm.training.processes import num_processes

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """Within `with`, the first SIGINT or SIGTERM ends the training after its step; a second one ends it at once.

    Several processes would end at different steps: there, signals end the training at once, as before.
    """

    def __init__(self, way_on: str) -> None:
        """Say, in the error, how the training goes on."""
        self._way_on = way_on
        self._got: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if num_processes() == 1 and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._got = signal.Signals(number)
        self.__exit__()
        logger.info("%s: the training ends after this step. A second one ends it at once.", self._got.name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._got is not None:
            control.should_save = control.should_log = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise the error, unless the training has ended anyway."""
        if self._got is not None and state.global_step < state.max_steps:
            raise StoppedError(
                f"training: {self._got.name} stopped it after step {state.global_step} of {state.max_steps}; a "
                f"checkpoint is kept in {args.output_dir}. {self._way_on}",
                exit_code=128 + self._got,
            )
