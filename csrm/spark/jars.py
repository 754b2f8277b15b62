"""Put Delta's jars into the installed pyspark, once: `csrm jars`, or `python -m csrm.spark.jars`.

After that every session and every spark-submit of this environment has Delta, without --packages and without network.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pyspark

from csrm.cli import run_job
from csrm.errors import ConfigError

# All else that Delta's jars ask for is in pyspark's jars folder already, in newer versions.
_COPIED_GROUPS = ("io.delta_", "io.unitycatalog_")
_STALE = ("delta-*.jar*", "unitycatalog-*.jar*")
_EXCLUDED = "org.*:*,com.*:*,javax.*:*,commons-*:*,io.airlift:*"

# Runs in a Python of its own, so that Ivy's long report is shown only when it fails.
_RESOLVE = """
import sys
from pyspark.sql import SparkSession
settings = {
    "spark.master": "local[1]", "spark.ui.enabled": "false",
    "spark.jars.packages": sys.argv[1], "spark.jars.excludes": sys.argv[2],
}
spark = SparkSession.builder.config(map=settings).getOrCreate()
print(spark.sparkContext.getConf().get("spark.jars"))
"""


def delta_coordinate() -> str:
    """Maven coordinate of the Delta that fits the installed delta-spark and pyspark."""
    spark_major_minor = ".".join(pyspark.__version__.split(".")[:2])
    return f"io.delta:delta-spark_{spark_major_minor}_2.13:{version('delta-spark')}"


def spark_jars_dir() -> Path:
    """Folder of the jars of the Spark that a session starts: that of SPARK_HOME, else pyspark's own."""
    return Path(os.environ.get("SPARK_HOME") or Path(pyspark.__file__).parent) / "jars"


def install_delta_jars(jars_dir: Path) -> list[str]:
    """Resolve Delta's jars with Ivy and copy them into a folder; jars of another Delta version there are removed.

    The main jar is copied last and by renaming: where it is, the set is complete, and an interrupted run starts again.

    Returns:
        Names of the copied files, sorted; empty where they were there already.

    Raises:
        ConfigError: Maven cannot be reached, or the folder cannot be written to.
    """
    coordinate = delta_coordinate()
    _, artifact, artifact_version = coordinate.split(":")
    main_jar = f"{artifact}-{artifact_version}.jar"
    if (jars_dir / main_jar).exists():
        return []
    # Ivy names its files group_artifact-version.jar.
    resolved = resolve_jars(coordinate)
    sources = {jar.name.partition("_")[2]: jar for jar in resolved if jar.name.startswith(_COPIED_GROUPS)}
    if main_jar not in sources:
        raise ConfigError(f"Delta's jars: expected {main_jar}, Ivy resolved {[jar.name for jar in resolved]}.")
    try:
        for pattern in _STALE:
            for stale in jars_dir.glob(pattern):
                stale.unlink()
        for name in sorted(sources, key=lambda name: name == main_jar):
            partial = jars_dir / f"{name}.partial"
            shutil.copyfile(sources[name], partial)
            partial.replace(jars_dir / name)
    except OSError as error:
        raise ConfigError(
            f"Delta's jars: cannot write to {str(jars_dir)!r} ({error.strerror}). Use an environment of your own."
        ) from error
    return sorted(sources)


def resolve_jars(coordinate: str) -> list[Path]:
    """Files of a Maven artifact and of what it needs beyond pyspark's jars, resolved with Ivy into its cache.

    Raises:
        ConfigError: Java is missing, or Maven cannot be reached, or has no such artifact.
    """
    environment = {name: value for name, value in os.environ.items() if name != "SPARK_HOME"}
    with tempfile.TemporaryDirectory() as work_dir:
        result = subprocess.run(
            [sys.executable, "-c", _RESOLVE, coordinate, _EXCLUDED],
            capture_output=True,
            text=True,
            env=environment,
            cwd=work_dir,
            check=False,
        )
    if result.returncode != 0:
        raise ConfigError(
            f"jars: {coordinate} could not be resolved. Is Java 17 or 21 there, and can Maven Central be "
            f"reached? A mirror is named by spark.jars.ivySettings in spark-defaults.conf of SPARK_CONF_DIR.\n"
            f"{result.stderr[-2000:].strip()}"
        )
    return [Path(jar.removeprefix("file:")) for jar in result.stdout.strip().split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Install the jars into this environment's pyspark and say so in one line."""
    parser = argparse.ArgumentParser(description="Put Delta's jars into the installed pyspark, once.")
    parser.parse_args(argv)
    jars_dir = Path(pyspark.__file__).parent / "jars"
    copied = install_delta_jars(jars_dir)
    if copied:
        print(f"Delta: {delta_coordinate()} resolved once, {len(copied)} jars copied to {jars_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
