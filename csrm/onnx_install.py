"""Which ONNX Runtime is installed: exactly one, because the CPU and the GPU package overwrite one folder."""

from importlib.metadata import PackageNotFoundError, version

from csrm.errors import ConfigError, MissingDependencyError


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
