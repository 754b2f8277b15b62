"""Publish a run that its audit had rejected, after a person reviewed it, or throw its scores away.

    csrm publish --config my_market/publish.yaml --run-id R --accept drift --reason "new season"
    csrm publish --config my_market/publish.yaml --run-id R --discard

Nothing is scored. Publishing needs a reason, which stays in the run's row; discarded scores are never used again.
"""

import argparse
from collections.abc import Sequence

from csrm.cli import Console, add_log_format, job_parser, job_settings
from csrm.errors import ConfigError
from csrm.operations.review import PublishConfig, discard_run, publish_rejected
from csrm.spark.catalogs import located_tables
from csrm.spark.session import build_session


def build_parser() -> argparse.ArgumentParser:
    parser = job_parser(__doc__, "conf/publish.yaml")
    parser.add_argument("--run-id", required=True, help="name of the run")
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        metavar="CHECK",
        help="failed check of the audit that is right all the same, such as drift or deleted_share; may be repeated",
    )
    parser.add_argument("--reason", default="", help="why; kept in the run's row")
    parser.add_argument("--discard", action="store_true", help="throw the run's staged scores away")
    add_log_format(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.discard == bool(args.accept):
        raise ConfigError("expected --accept CHECK with --reason, or --discard; one of the two.")
    config = job_settings(args, PublishConfig)
    console = Console(args.log_format == "json")
    spark = build_session("csrm-publish")
    config = located_tables(spark, config)
    if args.discard:
        discard_run(spark, config, args.run_id, console=console)
    else:
        publish_rejected(spark, config, args.run_id, accepted=args.accept, reason=args.reason, console=console)
    return 0
