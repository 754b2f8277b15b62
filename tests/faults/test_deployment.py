"""A night's way to a cluster: what the doctor sees there, an environment that is sent, the image's start script."""

import socket
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from tests.faults.cluster import ROOT, Cluster, clean_environment, wait_for
from tests.faults.night import Night

pytestmark = [pytest.mark.long, pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(900)]

DOCTOR = ROOT / "jobs" / "doctor.py"
DEPLOY = ROOT / "conf" / "deploy"
CHECKS_OF_EXECUTOR = ["python", "csrm", "packages", "onnxruntime", "gpu", "spill", "cache", "bundle", "scores"]
# What Spark itself gives to executors on Kubernetes, as SPARK_JAVA_OPT_0 and so on.
JAVA_OPTIONS = [
    *(f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in ("java.lang", "java.nio", "java.util", "sun.nio.ch")),
    "-XX:TieredStopAtLevel=1",
]


def arguments(night: Night, **settings: object) -> list[str]:
    """Of the doctor, for a night with a GPU for each task that scores."""
    return [*night.arguments("night", one_task_per_gpu=True, **settings)[:2], "--executors"]


def lines_of(output: str) -> dict[str, dict[str, str]]:
    """Place to check to the rest of its line."""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        if line.startswith(("ok ", "warning ", "FAILED ")):
            place, (name, text) = line[9:33].strip(), line[34:].split(None, 1)
            found.setdefault(place, {})[name] = f"{line.split()[0]} {text}"
    return found


def test_the_doctor_looks_at_every_executor_of_a_cluster(cluster: Cluster, night: Night) -> None:
    finished = cluster.run(
        *arguments(night), job=DOCTOR, properties=DEPLOY / "standalone.conf", cores=2, spark__speculation="true"
    )

    assert finished.code == 0, finished.output
    found = lines_of(finished.output)
    assert sorted(place.partition(" ")[2] for place in found if place != "driver") == ["gpu 0", "gpu 1"]
    for place, checks in found.items():
        if place != "driver":
            assert list(checks) == CHECKS_OF_EXECUTOR
            assert {text.split()[0] for text in checks.values()} <= {"ok", "warning"}
            assert "csrm.zip" in checks["csrm"]
            assert checks["scores"].startswith("ok 32 golden pairs have their scores on cpu")
    driver = found["driver"]
    assert driver["executors"] == "ok 2 of 2"
    assert driver["settings"].startswith("warning spark.speculation is on")
    assert driver["tables"].startswith("ok ")
    assert finished.output.splitlines()[-1] == "a night could run"
    assert list((night.folder / "tables").iterdir()) == []


def make_environment(folder: Path, *, with_packages: bool) -> str:
    """An environment in an archive, as spark.archives wants it; its packages stay where those of this test are."""
    venv.create(folder / "environment", symlinks=True, with_pip=False)
    if with_packages:
        (site,) = (folder / "environment").glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    with tarfile.open(folder / "environment.tar.gz", "w:gz") as archive:
        archive.add(folder / "environment", arcname=".")
    return f"{folder / 'environment.tar.gz'}#environment"


@pytest.mark.parametrize("with_packages", [True, False], ids=["whole", "without packages"])
def test_an_environment_can_be_sent_and_one_without_packages_is_told(
    cluster: Cluster, night: Night, tmp_path: Path, with_packages: bool
) -> None:
    finished = cluster.run(
        *arguments(night),
        job=DOCTOR,
        spark__archives=make_environment(tmp_path, with_packages=with_packages),
        spark__pyspark__python="./environment/bin/python",
        spark__pyspark__driver__python=sys.executable,
    )

    found = lines_of(finished.output)
    if with_packages:
        assert finished.code == 0, finished.output
        pythons = [checks["python"] for place, checks in found.items() if place != "driver"]
        assert len(pythons) == 2
        assert all(python.endswith("/environment") for python in pythons)
    else:
        assert finished.code == 2, finished.output
        assert "docs/deployment.md" in found["driver"]["executors"]


def says_spark(output: str) -> bool:
    """Whether the doctor has a session."""
    return "spark" in lines_of(output).get("driver", {})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_start_script_of_the_image_starts_a_driver_and_an_executor(
    cluster: Cluster, night: Night, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The driver takes whoever registers with it: beside the two workers' executors one that Kubernetes would start.
    monkeypatch.setenv("SPARK_DRIVER_BIND_ADDRESS", "127.0.0.1")
    port = free_port()
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 7\n")
    smi.chmod(0o755)
    others = clean_environment()
    executor = {
        **others,
        "PATH": f"{smi.parent}:{others['PATH']}",
        "SPARK_DRIVER_URL": f"spark://CoarseGrainedScheduler@127.0.0.1:{port}",
        "SPARK_EXECUTOR_ID": "7",
        "SPARK_EXECUTOR_CORES": "1",
        "SPARK_EXECUTOR_MEMORY": "1g",
        "SPARK_APPLICATION_ID": "night",
        "SPARK_EXECUTOR_POD_IP": "127.0.0.1",
        "SPARK_EXECUTOR_POD_NAME": "night-exec-1",
        "SPARK_RESOURCE_PROFILE_ID": "0",
        **{f"SPARK_JAVA_OPT_{number}": option for number, option in enumerate(JAVA_OPTIONS)},
    }
    with cluster.submit(
        *arguments(night),
        job=DOCTOR,
        program=(str(DEPLOY / "start.sh"), "driver"),
        spark__driver__port=port,
        spark__executor__instances=3,
        spark__executor__resource__gpu__discoveryScript=DEPLOY / "gpus.sh",
    ) as submitted:
        wait_for(lambda: says_spark(submitted.output) or not submitted.is_running, "a session")
        with (tmp_path / "executor.log").open("w") as log:
            started = subprocess.Popen(
                [str(DEPLOY / "start.sh"), "executor"], env=executor, cwd=tmp_path, stdout=log, stderr=log
            )
        try:
            finished = submitted.end()
            wait_for(lambda: started.poll() is not None, "the executor's end")
        finally:
            started.kill()
            started.wait()

    said = finished.output + (tmp_path / "executor.log").read_text()
    assert finished.code == 0, said
    places = [place for place in lines_of(finished.output) if place != "driver"]
    assert sorted(place.partition(" ")[2] for place in places) == ["gpu 0", "gpu 1", "gpu 7"], said
