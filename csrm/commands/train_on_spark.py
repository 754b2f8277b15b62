"""Run `csrm train` on the executors of a Spark cluster, one process for each, as one training.

Every path of the config must be on storage that driver and executors share under the same name; their Python must have
csrm with extra train. A stage's TensorBoard files are there too.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from pyspark.ml.torch.distributor import TorchDistributor

from csrm.cli import job_parser, job_settings, run_job
from csrm.commands import train
from csrm.spark.session import build_session
from csrm.training.settings import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    parser = job_parser(__doc__, "conf/train.yaml")
    parser.add_argument("--num-processes", type=int, default=2, help="processes, each with one device")
    parser.add_argument("--use-gpu", action="store_true", help="one GPU for each process, as Spark assigns them")
    parser.add_argument("--local", action="store_true", help="all processes on the driver instead of executors")
    args = parser.parse_args(argv)
    job_settings(args, TrainConfig)  # what is wrong with it is told here, not on an executor
    build_session("csrm-train")
    distributor = TorchDistributor(num_processes=args.num_processes, local_mode=args.local, use_gpu=args.use_gpu)
    overrides = [word for override in args.overrides for word in ("--set", override)]
    distributor.run(train_in_this_process, ["--config", str(Path(args.config).resolve()), *overrides])
    return 0


def train_in_this_process(argv: Sequence[str]) -> None:
    """Take part in a training as one of several processes; exits with the job's code where it fails."""
    if exit_code := run_job(train.main, argv):
        sys.exit(exit_code)
