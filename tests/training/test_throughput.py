import re

import pytest
import torch

from modern_llm.training.throughput import (
    GPU_TFLOPS,
    cpu_peak_flops,
    gpu_peak_flops,
    mfu,
    peak_flops,
    peak_memory_gb,
)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 4090", 165.2),
    ],
)
def test_dense_peak_by_device_name(name: str, tflops: float) -> None:
    assert gpu_peak_flops(name, "bf16") == tflops * 1e12


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA A1000", "Foo"],
)
def test_an_unknown_gpu_has_no_peak(name: str) -> None:
    assert gpu_peak_flops(name, "bf16") is None


def test_a_precision_without_a_figure_has_no_peak() -> None:
    assert gpu_peak_flops("Tesla V100-SXM2-16GB", "bf16") is None
    assert gpu_peak_flops("Tesla V100-SXM2-16GB", "fp16") == 125e12
    assert gpu_peak_flops("NVIDIA H100 80GB HBM3", "fp32") is None


def test_every_row_has_a_source_and_a_sane_figure() -> None:
    for pattern, tflops, precisions, source in GPU_TFLOPS:
        re.compile(pattern)
        assert 10 < tflops < 10_000
        assert set(precisions) <= {"bf16", "fp16"}
        assert source.startswith("https://")


def test_cpu_peak_is_measured_once_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"), "fp32")
    assert peak is not None
    assert 1e8 < peak < 1e14
    assert peak == cpu_peak_flops("fp32", torch.get_num_threads())
    assert torch.equal(torch.get_rng_state(), before)
    assert peak_flops(torch.device("meta"), "fp32") is None


def test_mfu() -> None:
    assert mfu(100.0, 6e6, 1.2e9) == pytest.approx(0.5)
    assert mfu(100.0, None, 1.2e9) is None
    assert mfu(100.0, 6e6, None) is None


def test_peak_memory_is_that_of_the_process() -> None:
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 100
