"""Whether a night could run.

    csrm doctor                                     this machine
    csrm doctor --config conf/score_catalog.yaml    also the night's bundle, device and folder of tables
    spark-submit jobs/doctor.py --config conf/score_catalog.yaml --executors    every executor of a cluster

Each check is one line: ok, warning or FAILED; what was looked at; what was found, and, where it failed, what was
expected and the way out. The exit code is 0 where a night could run, else that of the first check that failed.

Two things are left to the night, which looks at them before it scores: its input tables, and its other settings.
"""

from collections.abc import Iterator, Sequence

from csrm.cli import job_parser, job_settings
from csrm.doctor.checks import Check, checked
from csrm.doctor.machine import (
    PACKAGES,
    SPARK_PACKAGES,
    check_bundle,
    check_jars,
    check_java,
    checks_of_code,
    checks_of_scoring,
)
from csrm.night.settings import CheckedNight, NightSettings


def _checks_of_machine(settings: NightSettings | None) -> Iterator[tuple[str, Check]]:
    checks = [checked("java", check_java), checked("jars", check_jars)]
    can_start = not any(check.exit_code for check in checks)
    for check in (
        *checks_of_code(PACKAGES | SPARK_PACKAGES),
        *checks,
        *checks_of_scoring(settings, "cpu" if settings is None else settings.device),
    ):
        yield "", check
    if settings is not None and can_start:
        from csrm.doctor.cluster import check_tables

        yield "", checked("tables", check_tables, settings)


def _checks_of_cluster(settings: NightSettings) -> Iterator[tuple[str, Check]]:
    from csrm.doctor.cluster import check_session, check_settings, check_tables, checks_of_executors

    for check in checks_of_code(PACKAGES | SPARK_PACKAGES):
        yield "driver", check
    yield "driver", checked("bundle", check_bundle, settings)
    session = checked("spark", check_session)
    yield "driver", session
    if session.exit_code:
        return
    yield "driver", checked("settings", check_settings, settings)
    yield from checks_of_executors(settings)
    yield "driver", checked("tables", check_tables, settings)


def main(argv: Sequence[str] | None = None) -> int:
    parser = job_parser(
        "Say whether a night could run here, or on every executor of a cluster.", "conf/score_catalog.yaml"
    )
    parser.set_defaults(config=None)
    parser.add_argument("--executors", action="store_true", help="look at every executor, through a small Spark job")
    args = parser.parse_args(argv)
    if args.config is None and (args.executors or args.overrides):
        parser.error("--executors and --set need --config")
    settings = None if args.config is None else job_settings(args, CheckedNight)
    failed = []
    for where, check in (
        _checks_of_cluster(settings) if args.executors and settings is not None else _checks_of_machine(settings)
    ):
        place = f"{where:<24}" if args.executors else ""
        print(f"{check.verdict:<8} {place} {check.name:<12} {check.text}", flush=True)
        failed += [check] if check.exit_code else []
    if failed:
        print(f"no night could run: {len(failed)} of the checks failed: {', '.join(check.name for check in failed)}")
        return failed[0].exit_code
    print("a night could run")
    return 0
