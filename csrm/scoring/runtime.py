"""ONNX Runtime: exactly one of its packages, and a packed graph on a device that was asked for by name."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from csrm.errors import BundleError, ConfigError, DeviceError, MissingDependencyError
from csrm.scoring.packing import Pack
from csrm.scoring.scorer import PackScorer

CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
"""Instructions of a CPU, by their names in Linux, that ONNX Runtime's products of 8 bits use where they are there."""


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo"), names: Sequence[str] = CPU_FEATURES) -> tuple[str, ...]:
    """Those of some instructions that this machine has; empty where the system does not say.

    Args:
        cpuinfo: what Linux says of its processors.
        names: of the instructions in Linux.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return tuple(name for name in names if name in flags)


def load_pack_scorer(model_path: Path, device: str, threads: int | None = None) -> tuple[PackScorer, str]:
    """Session for a packed graph.

    Args:
        model_path: model.onnx of a bundle.
        device: cpu, cuda, or cuda:<number>.
        threads: threads of one forward pass on the CPU; None for one per core.

    Returns:
        The scorer, and the name of the provider that runs it.

    Raises:
        ConfigError: an unknown device, or two builds of ONNX Runtime are installed.
        DeviceError: the device is not there. ONNX Runtime itself would go on with the CPU.
        BundleError: the graph cannot be read, or is not a packed graph.
    """
    session, provider = open_session(model_path, device, threads)
    expected = set(Pack._fields)
    if {tensor.name for tensor in session.get_inputs()} != expected or "logits" not in _names(session.get_outputs()):
        raise BundleError(
            f"model {str(model_path)!r}: expected inputs {sorted(expected)} and output logits, got inputs "
            f"{_names(session.get_inputs())} and outputs {_names(session.get_outputs())}. Is it another model's graph?"
        )

    def score(pack: Pack) -> np.ndarray:
        (logits,) = session.run(["logits"], pack._asdict())
        return np.asarray(logits)

    return score, provider


def open_session(model_path: Path, device: str, threads: int | None = None) -> tuple[Any, str]:
    """Session for any graph, on the device that was asked for and no other.

    Args, Raises: see load_pack_scorer.

    Returns:
        onnxruntime.InferenceSession, and the name of the provider that runs it.
    """
    provider, options = require_device(device)
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    if threads is not None:
        session_options.intra_op_num_threads = threads
    session_options.inter_op_num_threads = 1
    if provider == "CUDAExecutionProvider":
        onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installed them, which no linker looks for; else the system's
    try:
        session = onnxruntime.InferenceSession(str(model_path), session_options, providers=[(provider, options)])
    except Exception as error:  # onnxruntime's errors have no common base
        if provider != "CPUExecutionProvider":
            raise DeviceError(f"device {device!r}: {error}") from error
        raise BundleError(f"model {str(model_path)!r}: onnxruntime cannot read it: {error}") from error
    if session.get_providers()[0] != provider:
        raise DeviceError(
            f"device {device!r}: expected {provider}, got {session.get_providers()}. "
            "Has the machine NVIDIA's driver (nvidia-smi), and one that fits the CUDA of onnxruntime "
            f"{onnxruntime.__version__}? Its own message before this one names the library that was missing."
        )
    return session, provider


def require_device(device: str) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's provider for a device, and its options.

    Raises:
        ConfigError, DeviceError: see load_pack_scorer.
    """
    require_one_onnxruntime()
    import onnxruntime  # where both of its packages or neither is installed, the line above says so

    provider, options = _provider(device)
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise DeviceError(
            f"device {device!r}: needs {provider}, but onnxruntime {onnxruntime.__version__} here has {available}. "
            "Install csrm[gpu] on a machine with a GPU, or ask for device cpu."
        )
    return provider, options


def graph_tensors(model_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and outputs of a graph: name to (type, shape), where named dimensions may have any size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # so that no weight is read
    session = onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
    inputs, outputs = (
        {tensor.name: (tensor.type, tuple(tensor.shape)) for tensor in tensors}
        for tensors in (session.get_inputs(), session.get_outputs())
    )
    return inputs, outputs


def _names(tensors: Sequence[Any]) -> list[str]:
    return sorted(tensor.name for tensor in tensors)


def _provider(device: str) -> tuple[str, dict[str, str]]:
    if device == "cpu":
        return "CPUExecutionProvider", {}
    name, _, number = device.partition(":")
    if name != "cuda" or not (number.isdigit() or device == "cuda"):
        raise ConfigError(f"device {device!r}: expected cpu, cuda or cuda:<number>.")
    return "CUDAExecutionProvider", {
        "device_id": number or "0",
        # In TF32, the default, float32 products keep 10 bits: a float32 graph then misses its golden scores.
        "use_tf32": "0",
        # Up to ONNX Runtime 1.26 a residual sum with its norm adds squares in float16 by default, and gives zeros.
        "enable_skip_layer_norm_strict_mode": "1",
    }


def require_one_onnxruntime() -> str:
    """Name of the installed distribution: onnxruntime or onnxruntime-gpu.

    Raises:
        ConfigError: both are installed.
        MissingDependencyError: neither is.
    """
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _is_installed(name)]
    if len(installed) > 1:
        raise ConfigError(
            "ONNX Runtime: expected one of onnxruntime and onnxruntime-gpu, got both; they overwrite one folder. "
            "Run: pip uninstall onnxruntime onnxruntime-gpu, then install csrm[cpu] or csrm[gpu]."
        )
    if not installed:
        raise MissingDependencyError(
            "ONNX Runtime: expected onnxruntime or onnxruntime-gpu, got neither. "
            "Install csrm[cpu], or csrm[gpu] on machines with a CUDA device."
        )
    return installed[0]


def _is_installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True
