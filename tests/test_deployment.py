"""What `conf/deploy` gives to a cluster: properties that Spark knows, scripts that run, an image whose parts fit."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import csrm

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "conf" / "deploy"
TEMPLATES = sorted(DEPLOY.glob("*.conf"))
SCRIPTS = sorted(DEPLOY.glob("*.sh"))


def read_properties(path: Path) -> dict[str, str]:
    """Properties as Spark reads them: what follows the name is the value, up to the end of the line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    pairs = [tuple(line.split(None, 1)) for line in lines]
    assert all(len(pair) == 2 for pair in pairs), path
    properties = dict(pairs)
    assert len(properties) == len(lines), f"{path}: a property that is there twice"
    return properties


def write_program(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
    path.chmod(0o755)


def run_script(name: str, *arguments: str, path: Path | None = None, **environment: str) -> Any:
    """A script of conf/deploy in a clean environment, whose programs may be found in one more folder."""
    search = f"{path}:{os.defpath}" if path else os.defpath
    command = [str(DEPLOY / name), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": search, **environment}, timeout=30
    )


def test_there_is_a_template_for_each_cluster_manager() -> None:
    assert [path.stem for path in TEMPLATES] == ["kubernetes", "standalone", "yarn"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_no_comment_becomes_part_of_a_value(path: Path) -> None:
    for name, value in read_properties(path).items():
        assert name.startswith("spark."), name
        assert not re.search(r"\s|#(?!environment$)", value), f"{name}: {value}"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_gives_gpus_to_tasks_that_score_alone_and_scores_nothing_twice(path: Path) -> None:
    properties = read_properties(path)

    assert properties["spark.executor.resource.gpu.amount"] == "1"
    assert "spark.task.resource.gpu.amount" not in properties  # or the joins would wait for GPUs, too
    assert "spark.executor.pyspark.memory" not in properties
    assert properties["spark.speculation"] == properties["spark.dynamicAllocation.enabled"] == "false"
    assert properties["spark.executorEnv.CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    if path.stem != "standalone":  # where it has no meaning
        assert properties["spark.executor.memoryOverhead"] == "16g"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_names_files_that_are_there(path: Path) -> None:
    named = re.findall(r"(?<![\w/.])(?:/opt/csrm/)?((?:conf|jobs)/[\w/.]+)", path.read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_can_be_run(path: Path) -> None:
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.parametrize("indexes", [["0"], ["0", "1", "10"]])
def test_the_discovery_script_gives_spark_the_gpus_that_nvidia_smi_lists(tmp_path: Path, indexes: list[str]) -> None:
    write_program(tmp_path / "nvidia-smi", 'test "$*" = "--query-gpu=index --format=csv,noheader" || exit 1')
    with (tmp_path / "nvidia-smi").open("a") as program:
        program.writelines(f"echo {index}\n" for index in indexes)

    finished = run_script("gpus.sh", path=tmp_path)

    assert json.loads(finished.stdout) == {"name": "gpu", "addresses": indexes}


def test_a_machine_without_a_gpu_offers_none(tmp_path: Path) -> None:
    assert run_script("gpus.sh").returncode != 0  # no driver
    write_program(tmp_path / "nvidia-smi")
    finished = run_script("gpus.sh", path=tmp_path)
    assert (finished.returncode, finished.stdout) == (1, "")
    assert "expected a GPU, nvidia-smi lists none" in finished.stderr


def test_the_image_starts_an_executor_with_what_kubernetes_gives_it(tmp_path: Path) -> None:
    write_program(tmp_path / "java", 'printf "%s\\n" "$@"')
    given = {
        "SPARK_HOME": "/spark",
        "SPARK_CONF_DIR": "/opt/spark/conf",
        "SPARK_EXTRA_CLASSPATH": "/more/jars/*",
        "SPARK_DRIVER_URL": "spark://CoarseGrainedScheduler@driver:7078",
        "SPARK_EXECUTOR_ID": "3",
        "SPARK_EXECUTOR_CORES": "8",
        "SPARK_EXECUTOR_MEMORY": "8192m",
        "SPARK_APPLICATION_ID": "spark-1",
        "SPARK_EXECUTOR_POD_IP": "10.0.0.3",
        "SPARK_EXECUTOR_POD_NAME": "night-exec-3",
        "SPARK_RESOURCE_PROFILE_ID": "0",
        "SPARK_JAVA_OPT_0": "-Dwords=two words",
        "SPARK_JAVA_OPT_1": "--add-opens=java.base/java.nio=ALL-UNNAMED",
    }

    finished = run_script("start.sh", "executor", path=tmp_path, **given)

    assert finished.stdout.splitlines() == [
        "-Dwords=two words",
        "--add-opens=java.base/java.nio=ALL-UNNAMED",
        "-Xms8192m",
        "-Xmx8192m",
        "-cp",
        f"/opt/spark/conf:/spark/jars/*:/more/jars/*:{Path.cwd()}",
        "org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend",
        *("--driver-url", "spark://CoarseGrainedScheduler@driver:7078", "--executor-id", "3", "--cores", "8"),
        *("--app-id", "spark-1", "--hostname", "10.0.0.3", "--resourceProfileId", "0", "--podName", "night-exec-3"),
    ]
    del given["SPARK_DRIVER_URL"]
    assert "SPARK_DRIVER_URL: unbound variable" in run_script("start.sh", "executor", path=tmp_path, **given).stderr


def test_the_image_starts_a_driver_as_a_client_and_anything_else_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    write_program(tmp_path / "bin" / "spark-submit", 'printf "%s\\n" "$@"')
    given = {"SPARK_HOME": str(tmp_path), "SPARK_DRIVER_BIND_ADDRESS": "10.0.0.2"}

    finished = run_script("start.sh", "driver", "--class", "PythonRunner", "local:///job.py", **given)

    assert finished.stdout.splitlines() == [
        *("--deploy-mode", "client", "--conf", "spark.driver.bindAddress=10.0.0.2"),
        *("--conf", "spark.executorEnv.SPARK_DRIVER_POD_IP=10.0.0.2", "--class", "PythonRunner", "local:///job.py"),
    ]
    assert run_script("start.sh", "echo", "two words").stdout == "two words\n"


def test_the_image_is_made_of_files_that_are_there_and_of_pinned_packages() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    copied = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"constraints.txt", "constraints-gpu.txt", "csrm", "jobs", "conf"} <= set(copied)
    (install,) = re.findall(r"pip install (.+?)\s+&&", text)
    assert install.split() == [
        *("--no-cache-dir", "--constraint", "constraints.txt", "--constraint", "constraints-gpu.txt"),
        *('".[gpu]"', '"onnxruntime-gpu[cuda,cudnn]"'),
    ]
    # The pins were made with one Python, which the image has.
    (tested,) = re.findall(r"Python ([\d.]+)", (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()[0])
    assert re.findall(r"^FROM python:([\d.]+)-", text, re.MULTILINE) == [tested]
    assert set(re.findall(r"lib/python([\d.]+)/", text)) == {tested}


def test_the_image_has_the_name_and_the_folders_that_its_template_names() -> None:
    text, properties = (DEPLOY / "Dockerfile").read_text(encoding="utf-8"), read_properties(DEPLOY / "kubernetes.conf")
    image = properties["spark.kubernetes.container.image"]
    assert image == f"csrm-gpu:{csrm.__version__}"
    assert f"docker build -f conf/deploy/Dockerfile -t {image} ." in text
    assert f"PYSPARK_PYTHON={properties['spark.pyspark.python']}" in text
    (made,) = re.findall(r"install -d -o csrm (.+)", text)
    mounted = {value for name, value in properties.items() if name.endswith(".mount.path")}
    assert mounted <= set(made.split())


def test_gpu_machines_have_other_pins_only_for_what_others_lack() -> None:
    pins = {}
    for name in ("constraints.txt", "constraints-gpu.txt"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        pins[name] = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    gpu = pins["constraints-gpu.txt"]

    assert pins["constraints.txt"].keys() & gpu.keys() == set()
    assert {"onnxruntime-gpu", "cuda-toolkit", "nvidia-cublas", "nvidia-cudnn-cu13"} <= gpu.keys()
    # One CUDA: what the toolkit of that version brings.
    assert {gpu[name].rpartition(".")[0] for name in ("nvidia-cuda-runtime", "nvidia-cuda-nvrtc")} == {
        gpu["cuda-toolkit"].rpartition(".")[0]
    }


@pytest.mark.spark
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_spark_knows_every_property_of_a_template(spark: Any, path: Path) -> None:
    jvm = spark.sparkContext._jvm
    core, volumes = jvm.org.apache.spark, "spark.kubernetes.executor.volumes."
    for holder in (
        *("internal.config.package$", "internal.config.Worker$", "internal.config.Python$", "sql.internal.SQLConf$"),
        *("deploy.k8s.Config$", "deploy.yarn.config.package$"),
    ):
        jvm.java.lang.Class.forName(f"org.apache.spark.{holder}")  # its entries are known once it is loaded
    properties = read_properties(path)
    conf = core.SparkConf(False)
    for name, value in properties.items():
        conf.set(name, value)

    unknown = []
    for name, value in properties.items():
        if re.match(r"spark\.(executorEnv|yarn\.appMasterEnv)\.\w+$", name) or name.startswith(volumes):
            continue
        if found := re.match(r"(spark\.(?:executor|worker))\.resource\.gpu\.", name):
            request = core.resource.ResourceUtils.parseResourceRequest(conf, core.resource.ResourceID(found[1], "gpu"))
            known = {"amount": str(request.amount())}
            for field in ("discoveryScript", "vendor"):
                option = getattr(request, field)()
                known[field] = option.get() if option.isPresent() else None
            if known.get(name.rpartition(".")[2]) != value:
                unknown.append(name)
            continue
        entry = core.internal.config.ConfigEntry.findEntry(name)
        if entry is None:
            unknown.append(name)
        else:
            conf.get(entry)  # raises where the value is not one of its kind

    assert unknown == []
    parsed = core.deploy.k8s.KubernetesVolumeUtils.parseVolumesWithPrefix(conf, volumes)
    assert parsed.size() == len({name.split(".")[5] for name in properties if name.startswith(volumes)})


@pytest.mark.spark
def test_the_pod_that_spark_makes_of_the_template_has_a_gpu_and_what_the_start_script_reads(spark: Any) -> None:
    jvm = spark.sparkContext._jvm
    core, nothing = jvm.org.apache.spark, getattr(getattr(jvm.scala, "None$"), "MODULE$")
    conf = core.SparkConf(False)
    for name, value in {**read_properties(DEPLOY / "kubernetes.conf"), "spark.driver.host": "d"}.items():
        conf.set(name, value)
    conf.set("spark.driver.port", "7078")
    executor = core.deploy.k8s.KubernetesConf.createExecutorConf(conf, "3", "night", nothing, 0)
    profiles = getattr(getattr(core.resource, "ResourceProfile$"), "MODULE$")
    security = spark.sparkContext._jsc.sc().env().securityManager()
    profiles.clearDefaultProfile()  # that of the session, of which Spark keeps one
    try:
        profile = profiles.getOrCreateDefaultProfile(conf)
    finally:
        profiles.clearDefaultProfile()
    builder = core.scheduler.cluster.k8s.KubernetesExecutorBuilder()
    pod = builder.buildFromFeatures(executor, security, None, profile).pod()
    container = json.loads(jvm.io.fabric8.kubernetes.client.utils.Serialization.asJson(pod.container()))

    assert container["args"] == ["executor"]
    assert container["image"] == f"csrm-gpu:{csrm.__version__}"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1", "memory": f"{(8 + 16) * 1024}Mi"}
    assert container["resources"]["requests"]["cpu"] == "8"
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert given["SPARK_LOCAL_DIRS"] == "/var/spark"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {given["SPARK_CONF_DIR"], "/var/cache/csrm", "/var/spark"}
    script = (DEPLOY / "start.sh").read_text(encoding="utf-8").partition("executor)")[2]
    optional = {"SPARK_HOME", "SPARK_EXTRA_CLASSPATH"}  # of the image; where spark.executor.extraClassPath is set
    read = set(re.findall(r"\$\{?(SPARK_\w+)", script)) - optional
    assert {"SPARK_DRIVER_URL", "SPARK_EXECUTOR_MEMORY", "SPARK_RESOURCE_PROFILE_ID"} <= read <= given.keys()
