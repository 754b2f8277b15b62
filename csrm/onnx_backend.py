"""ONNX Runtime: a packed graph on a device that was asked for by name."""

from pathlib import Path

import numpy as np

from csrm.errors import BundleError, ConfigError, DeviceError
from csrm.onnx_install import require_one_onnxruntime
from csrm.packing import PackBatch
from csrm.scoring import PackScorer


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
        BundleError: the graph cannot be read.
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
    session_options = onnxruntime.SessionOptions()
    session_options.log_severity_level = 3
    if threads is not None:
        session_options.intra_op_num_threads = threads
    session_options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(model_path), session_options, providers=[(provider, options)])
    except Exception as error:  # onnxruntime's errors have no common base
        if provider != "CPUExecutionProvider":
            raise DeviceError(f"device {device!r}: {error}") from error
        raise BundleError(f"model {str(model_path)!r}: onnxruntime cannot read it: {error}") from error
    if session.get_providers()[0] != provider:
        raise DeviceError(
            f"device {device!r}: expected {provider}, got {session.get_providers()}. "
            f"Does the CUDA version fit onnxruntime {onnxruntime.__version__}?"
        )

    def score(batch: PackBatch) -> np.ndarray:
        (logits,) = session.run(["logits"], batch.model_inputs())
        return np.asarray(logits)

    return score, provider


def _provider(device: str) -> tuple[str, dict[str, str]]:
    if device == "cpu":
        return "CPUExecutionProvider", {}
    name, _, number = device.partition(":")
    if name != "cuda" or not (number.isdigit() or device == "cuda"):
        raise ConfigError(f"device {device!r}: expected cpu, cuda or cuda:<number>.")
    return "CUDAExecutionProvider", {"device_id": number or "0"}
