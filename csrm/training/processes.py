"""A job in several processes: the first runs it, the others take part in the work that it hands out.

    torchrun --nproc-per-node 2 jobs/train.py ...

The first process reads, decides and writes. So a job needs no guards, and processes cannot decide differently.
"""

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from csrm.cli import Main

Result = TypeVar("Result")

LONGEST_WAIT = timedelta(hours=24)
"""How long a process waits for work while the first reads, scores or writes."""

_group: dist.ProcessGroup | None = None
"""Of all processes, on the CPU; None in a single process."""


def across_processes(main: Main) -> Main:
    """A job's main function that, under torchrun, runs in the first process while the others wait for work.

    A process that fails leaves the others waiting; torchrun then ends them.
    """

    def run(argv: Sequence[str] | None = None) -> int:
        global _group
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return main(argv)
        is_first = PartialState(cpu=not torch.cuda.is_available()).is_main_process
        _group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)  # type: ignore[assignment]
        exit_code = 0
        if is_first:
            exit_code = main(argv)
            _handed_out(None)
        else:
            while (work := _handed_out(None)) is not None:
                work()
                dist.barrier(group=_group)
        dist.destroy_process_group()
        return exit_code

    return run


def run_everywhere(work: Callable[[], Result]) -> Result:
    """Run work in all processes at once, and wait until it has ended in all.

    Args:
        work: can be pickled.

    Returns:
        What it gives in this process, the first.
    """
    if _group is None:
        return work()
    _handed_out(work)
    result = work()
    dist.barrier(group=_group)
    return result


def num_processes() -> int:
    """Processes that run_everywhere runs in."""
    return 1 if _group is None else dist.get_world_size(_group)


def _handed_out(work: Callable[[], object] | None) -> Callable[[], object] | None:
    """The first process's work, in all; None: there is no more."""
    box = [work]
    dist.broadcast_object_list(box, src=0, group=_group, device=torch.device("cpu"))
    return box[0]
