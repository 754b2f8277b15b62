"""Whether a night could run.

    csrm doctor                                     this machine
    csrm doctor --config conf/score_catalog.yaml    also the night's bundle, device and folder of tables
    spark-submit jobs/doctor.py --config conf/score_catalog.yaml --executors    every executor of a cluster
    csrm doctor --build conf/build_candidates.yaml    also the encoder of a build, and its table of vectors

Each check is one line: ok, warning or FAILED; what was looked at; what was found, and, where it failed, what was
expected and the way out. The exit code is 0 where a night could run, else that of the first check that failed.

Two things are left to the night, which looks at them before it scores: its input tables, and its other settings.
"""

from collections.abc import Iterator, Sequence

from csrm.cli import job_parser, job_settings
from csrm.config import load_config
from csrm.doctor.checks import Check, checked
from csrm.doctor.encoder import CheckedBuild, check_one_encoder, checks_of_encoder, require_search
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


def _checks_of_machine(settings: NightSettings | None, builds: Sequence[CheckedBuild]) -> Iterator[tuple[str, Check]]:
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
    for check in _checks_of_builds(builds, has_spark=can_start, has_machine=True):
        yield "", check


def _checks_of_builds(builds: Sequence[CheckedBuild], *, has_spark: bool, has_machine: bool) -> Iterator[Check]:
    """What builds that search by meaning need; each encoder is proven once on each device.

    Args:
        builds: the settings of each.
        has_spark: whether Spark could start.
        has_machine: whether this machine embeds.
    """
    seen = set()
    for build in builds:
        search = build.search
        if search is None:
            continue
        if has_machine and (search.encoder, search.device) not in seen:
            yield from checks_of_encoder(search, search.device)
        if has_spark and (search.encoder, build.tables) not in seen:
            from csrm.doctor.cluster import check_text_vectors

            yield checked("text_vectors", check_text_vectors, build.tables, search.encoder)
        seen |= {(search.encoder, search.device), (search.encoder, build.tables)}
    if len(builds) > 1:
        yield checked("encoders", check_one_encoder, builds)


def _checks_of_cluster(settings: NightSettings, builds: Sequence[CheckedBuild]) -> Iterator[tuple[str, Check]]:
    from csrm.doctor.cluster import check_session, check_settings, check_tables, checks_of_executors

    for check in checks_of_code(PACKAGES | SPARK_PACKAGES):
        yield "driver", check
    yield "driver", checked("bundle", check_bundle, settings)
    session = checked("spark", check_session)
    yield "driver", session
    if session.exit_code:
        return
    yield "driver", checked("settings", check_settings, settings)
    yield from checks_of_executors(settings, searches=[search for build in builds if (search := build.search)])
    yield "driver", checked("tables", check_tables, settings)
    for check in _checks_of_builds(builds, has_spark=True, has_machine=False):
        yield "driver", check


def main(argv: Sequence[str] | None = None) -> int:
    parser = job_parser(
        "Say whether a night could run here, or on every executor of a cluster.", "conf/score_catalog.yaml"
    )
    parser.set_defaults(config=None)
    parser.add_argument("--executors", action="store_true", help="look at every executor, through a small Spark job")
    parser.add_argument(
        "--build",
        action="append",
        default=[],
        metavar="FILE",
        help="configuration of build_retrieval_table, build_candidates or embed_catalog, whose encoder and table of "
        "vectors are looked at; may be repeated",
    )
    args = parser.parse_args(argv)
    if args.config is None and (args.executors or args.overrides or args.show_config):
        parser.error("--executors, --set and --show-config need --config")
    settings = None if args.config is None else job_settings(args, CheckedNight)
    builds = [load_config(path, CheckedBuild) for path in args.build]
    if builds:
        require_search(builds)
    failed = []
    for where, check in (
        _checks_of_cluster(settings, builds)
        if args.executors and settings is not None
        else _checks_of_machine(settings, builds)
    ):
        place = f"{where:<24}" if args.executors else ""
        print(f"{check.verdict:<8} {place} {check.name:<12} {check.text}", flush=True)
        failed += [check] if check.exit_code else []
    if failed:
        print(f"no night could run: {len(failed)} of the checks failed: {', '.join(check.name for check in failed)}")
        return failed[0].exit_code
    print("a night could run")
    return 0
