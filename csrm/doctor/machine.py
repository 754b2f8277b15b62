"""Checks of one machine: Python, packages, Java, ONNX Runtime, the GPU, disks, the bundle."""

import operator
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import csrm
from csrm.artefacts.cache import cache_dir, is_far
from csrm.bundle.contents import other_cpu
from csrm.bundle.loading import load_bundle, load_scorer
from csrm.doctor.checks import Check, CheckWarning, checked
from csrm.errors import ConfigError, DeviceError
from csrm.night.settings import NightSettings
from csrm.scoring.runtime import cpu_features, require_one_onnxruntime

SPARK_PACKAGES = {"pyspark": ">=4.2,<4.3", "delta-spark": ">=4.4,<4.5,!=4.4.1"}
"""What a driver needs; executors get Spark's Python code from Spark itself."""
PACKAGES = {
    "numpy": ">=2",
    "pandas": ">=2.2,<3",
    "pyarrow": ">=18",
    "pyyaml": ">=6",
    "pydantic": ">=2.7",
    "tokenizers": ">=0.22",
    "tqdm": ">=4.66",
    "regex": ">=2024.4",
}
"""What scoring needs, as pyproject.toml has it."""
RUNTIME = ">=1.22"
"""Of onnxruntime or onnxruntime-gpu."""
JAVA_VERSIONS = ("17", "21")
LEAST_FREE_GB, ENOUGH_FREE_GB = 1.0, 10.0
"""Less than the first fails, less than the second is a warning."""
_PATIENCE_S = 60


def checks_of_code(needed: Mapping[str, str], driver: Mapping[str, str] | None = None) -> Iterator[Check]:
    """Python, CSRM and the packages of this process.

    Args:
        needed: package to its bounds.
        driver: versions on the driver (see installed_versions), with which those of an executor are compared.
    """
    yield checked("python", check_python)
    yield checked("csrm", check_code, driver)
    yield checked("packages", check_packages, needed, driver)


def checks_of_scoring(
    settings: NightSettings | None,
    device: str,
    gpu: str | None = None,
    threads: int | None = None,
    digest: str | None = None,
) -> Iterator[Check]:
    """What a process that scores needs of its machine: runtime, device, room on disk, and a bundle that proves itself.

    Args:
        settings: None: without a bundle.
        device: cpu, cuda or cuda:<number>.
        gpu: address that Spark gave the task.
        threads: of one forward pass; see load_scorer.
        digest: that the bundle must have; None: the one that the settings pin, or any.
    """
    yield checked("onnxruntime", check_runtime, device)
    if gpu is not None or device.startswith("cuda"):
        yield checked("gpu", check_gpu, device, gpu)
    for folder in spill_folders():
        yield checked("spill", check_disk, folder, "SPARK_LOCAL_DIRS")
    if settings is None:
        return
    if is_far(settings.bundle):
        yield checked("cache", lambda: check_disk(cache_dir(), "CSRM_CACHE_DIR"))
    bundle = checked("bundle", check_bundle, settings, digest)
    yield bundle
    if not bundle.exit_code:
        yield checked("scores", check_scores, settings, device, threads)


def check_python() -> str:
    return f"{platform.python_version()} in {sys.prefix}"


def check_code(driver: Mapping[str, str] | None) -> str:
    found = f"{csrm.__version__} in {Path(csrm.__file__).parent}"
    if driver is not None and csrm.__version__ != driver["csrm"]:
        raise ConfigError(f"expected {driver['csrm']}, which the driver has, found {found}. Install one version.")
    return found


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Packages that are installed, and CSRM itself, with their versions."""
    found = {"csrm": csrm.__version__}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_packages(needed: Mapping[str, str], driver: Mapping[str, str] | None) -> str:
    found = installed_versions(needed)
    problems = [
        f"{name}: expected {bounds}, found {found.get(name, 'none')}"
        for name, bounds in needed.items()
        if name not in found or not fits(found[name], bounds)
    ]
    if problems:
        raise ConfigError(f"{'; '.join(problems)}. Install csrm with its constraints.txt.")
    others = [
        f"{name} {found[name]}, the driver has {driver[name]}"
        for name in needed
        if driver is not None and name in driver and driver[name] != found[name]
    ]
    if others:
        raise CheckWarning(f"{'; '.join(others)}. Give all machines one environment: versions can change scores.")
    return ", ".join(f"{name} {found[name]}" for name in needed)


def fits(number: str, bounds: str) -> bool:
    """Whether a version is within bounds such as `>=4.4,<4.5,!=4.4.1`."""
    compare = {">=": operator.ge, "<": operator.lt, "!=": operator.ne}
    parts = re.findall(r"(>=|<|!=)([\d.]+)", bounds)
    return all(compare[sign](_numbers(number), _numbers(bound)) for sign, bound in parts)


def _numbers(number: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", number.partition("+")[0])[:3])


def check_java() -> str:
    """The Java that Spark would start, and that it is one of those that can run this Spark."""
    way_out = f"Install Java {' or '.join(JAVA_VERSIONS)} (openjdk-17-jre-headless) and name its folder by JAVA_HOME."
    java = os.path.join(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    # Spark adds this module; a Java that was cut down may lack it.
    command = [java, "--add-modules", "jdk.incubator.vector", "-XshowSettings:properties", "-version"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{java}: cannot be run ({error}). {way_out}") from error
    properties = dict(re.findall(r"^ *(java\.\S+) = (.+)$", said.stderr, re.MULTILINE))
    number = properties.get("java.specification.version")
    if said.returncode or number not in JAVA_VERSIONS:
        found = f"version {number}" if number else said.stderr
        raise ConfigError(f"{java}: expected version {' or '.join(JAVA_VERSIONS)}, found {found}. {way_out}")
    return f"{properties['java.version']} in {properties['java.home']}"


def check_jars() -> str:
    """Spark's and Delta's jars, and that they fit the Python packages."""
    from csrm.spark.jars import delta_coordinate, spark_jars_dir

    folder, spark_version = spark_jars_dir(), version("pyspark")
    cores = [path.name for path in folder.glob("spark-core_*.jar")]
    if cores != [f"spark-core_2.13-{spark_version}.jar"]:
        raise ConfigError(
            f"{folder}: expected Spark {spark_version}, which pyspark is, found {cores or 'none'}. Unset SPARK_HOME, "
            "or install the pyspark of that Spark."
        )
    _, artifact, number = delta_coordinate().split(":")
    expected, deltas = f"{artifact}-{number}.jar", [path.name for path in folder.glob("delta-spark_*.jar")]
    if not deltas:
        raise CheckWarning(
            f"Spark {spark_version}, but no Delta in {folder}: each session has to fetch it, or needs --packages. Once "
            "and for all: csrm jars"
        )
    if deltas != [expected]:
        raise ConfigError(f"{folder}: expected {expected}, found {deltas}. Run: csrm jars")
    return f"Spark {spark_version} and {expected} in {folder}"


def check_runtime(device: str) -> str:
    name = require_one_onnxruntime()
    number = version(name)
    if not fits(number, RUNTIME):
        raise ConfigError(f"expected {name}{RUNTIME}, found {number}. Install csrm with its constraints.txt.")
    import onnxruntime

    from csrm.scoring.runtime import require_device

    provider, _ = require_device(device)
    cuda = getattr(onnxruntime, "cuda_version", "")
    return f"{name} {number}{f' for CUDA {cuda}' if cuda else ''}, {provider} for device {device}"


def check_gpu(device: str, address: str | None) -> str:
    """The GPU of a task, and its driver, as nvidia-smi knows them.

    Raises:
        DeviceError: nvidia-smi lists no such GPU.
        CheckWarning: nvidia-smi cannot be asked.
    """
    if not device.startswith("cuda"):
        return f"address {address} from Spark, without a use: the device is {device}"
    number = device.partition(":")[2] or "0"
    command = ["nvidia-smi", "--query-gpu=index,name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CheckWarning(f"{number}; nvidia-smi cannot be asked about it ({error})") from error
    gpus = dict(line.split(", ", 1) for line in said.splitlines() if ", " in line)
    if number not in gpus:
        raise DeviceError(
            f"expected GPU {number}, nvidia-smi lists {sorted(gpus) or 'none'}. A discovery script must give the "
            "indexes that it lists (conf/deploy/gpus.sh)."
        )
    return f"{number}: {gpus[number]}"


def spill_folders() -> list[Path]:
    """Where Spark puts what does not fit into memory."""
    named = [name for name in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if name]
    return [Path(name) for name in named or [tempfile.gettempdir()]]


def check_disk(folder: Path, setting: str) -> str:
    """Room in a folder that can be written to.

    Args:
        folder: it need not exist.
        setting: what names another folder, for the message.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
        free_gb = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written to ({error.strerror}). Let the user that runs Spark write there, or name "
            f"another folder by {setting}."
        ) from error
    text = f"{folder}: {free_gb:,.1f} GB free"
    if free_gb < LEAST_FREE_GB:
        raise ConfigError(f"{text}, expected at least {LEAST_FREE_GB:g}. Make room, or name another by {setting}.")
    if free_gb < ENOUGH_FREE_GB:
        raise CheckWarning(f"{text}, which a large night may fill. {setting} names another folder.")
    return text


def check_bundle(settings: NightSettings, digest: str | None = None) -> str:
    bundle = load_bundle(settings.bundle, digest or settings.bundle_digest)
    about = bundle.settings
    pinned = "" if settings.bundle_digest else "; not pinned by bundle_digest"
    size = f"{bundle.num_bytes / 1e6:,.1f} MB"
    return f"{bundle.digest[:12]} ({about.precision}, proven on {about.device}), {size}, every file whole{pinned}"


def check_scores(settings: NightSettings, device: str, threads: int | None) -> str:
    scorer = load_scorer(settings.bundle, device, threads=threads, num_golden=None)
    bundle = load_bundle(settings.bundle)
    found = f"{len(bundle.golden_pairs())} golden pairs have their scores on {device} ({scorer.provider})"
    if slower := other_cpu(bundle.settings, cpu_features()):
        raise CheckWarning(f"{found}; {slower}.")
    return found
