from __future__ import annotations

import pytest
import torch

from griffin.trainer.measuring import peak as peak_module
from griffin.trainer.measuring.peak import known_tflops, measured_tflops, peak

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L40", 181.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A1000", None),
        ("Something else", None),
    ],
)
def test_known_devices(name: str, tflops: float | None) -> None:
    assert known_tflops(name, torch.bfloat16) == tflops


@pytest.mark.parametrize(("allowed", "expected"), [(False, 66.9), (True, 494.7)])
def test_float32_peak_depends_on_tf32(allowed: bool, expected: float) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        assert known_tflops("NVIDIA H100 80GB HBM3", torch.float32) == expected
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_configured_peak_takes_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (peak(CPU, torch.float32, 123.0).tflops, peak(CPU, torch.float32, 123.0).source) == (123.0, "set")
    assert 1e-3 < measured_tflops(CPU, torch.float32) < 100
    monkeypatch.setattr(peak_module, "measured_tflops", lambda device, dtype: 0.5)
    assert (peak(CPU, torch.float32, 0.0).tflops, peak(CPU, torch.float32, 0.0).source) == (0.5, "measured")
