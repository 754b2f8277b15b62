"""ONNX Runtime's provider for a device, and the options that scores depend on."""

from pathlib import Path

import onnxruntime
import pytest

from csrm.errors import ConfigError, DeviceError
from csrm.scoring.runtime import cpu_features, require_device


def test_a_gpu_computes_float32_as_such_and_sums_squares_of_residuals_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    expected = {"device_id": "1", "use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}
    assert require_device("cuda:1") == ("CUDAExecutionProvider", expected)
    assert require_device("cuda")[1] == expected | {"device_id": "0"}


def test_a_device_that_is_not_there_or_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert require_device("cpu") == ("CPUExecutionProvider", {})
    with pytest.raises(DeviceError, match=r"device 'cuda': needs CUDAExecutionProvider, but .* ask for device cpu"):
        require_device("cuda")
    with pytest.raises(ConfigError, match=r"device 'cuda:x': expected cpu, cuda or cuda:<number>"):
        require_device("cuda:x")


def test_features_of_the_cpu_are_read_from_its_flags(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx avx2 avx512f avx512_vnni\n")
    assert cpu_features(cpuinfo) == ("avx2", "avx512f", "avx512_vnni")
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu\n")
    assert cpu_features(cpuinfo) == ()
    assert cpu_features(tmp_path / "absent") == ()
