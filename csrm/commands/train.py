"""Train a multilingual language model to judge relevance: translation, judgments of source markets, repaired labels.

On several devices: torchrun --nproc-per-node 2 jobs/train.py ...
"""

from collections.abc import Sequence

from csrm.cli import job_parser, job_settings
from csrm.training.processes import across_processes
from csrm.training.recipe import train_relevance
from csrm.training.settings import TrainConfig
from csrm.training.summary import format_training


@across_processes
def main(argv: Sequence[str] | None = None) -> int:
    parser = job_parser(__doc__, "conf/train.yaml")
    parser.add_argument(
        "--finish", action="store_true", help="end a training that was stopped, with its best step so far"
    )
    args = parser.parse_args(argv)
    result = train_relevance(job_settings(args, TrainConfig), finish=args.finish)
    print(format_training(result))
    return 0
