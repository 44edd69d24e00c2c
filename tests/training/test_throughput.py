import re

import pytest
import torch

from modern_llm.models.cost import Cost
from modern_llm.training.throughput import (
    GPU_TFLOPS,
    Work,
    cpu_peak_flops,
    device_peak,
    gpu_peak,
    mfu,
    peak_flops,
)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA B200", 2250),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A30", 165),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 438.9),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA GeForce RTX 5080", 112.6),
        ("NVIDIA GeForce RTX 5070 Ti", 87.9),
        ("NVIDIA GeForce RTX 5070", 61.7),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4080", 97.5),
        ("NVIDIA GeForce RTX 4070 Ti", 80.2),
        ("NVIDIA GeForce RTX 4070", 58.3),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("GeForce RTX 3090", 71.0),
    ],
)
def test_dense_peak_by_device_name(name: str, tflops: float) -> None:
    peak = gpu_peak(name, "bf16")
    assert peak is not None
    assert peak.flops == tflops * 1e12
    assert gpu_peak(name, "fp16") == peak
    assert peak.source.startswith("https://")


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA GeForce RTX 5070 Ti Laptop GPU",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA GeForce RTX 4070 Ti SUPER",
        "NVIDIA GeForce RTX 4070 SUPER",
        "NVIDIA GeForce RTX 3080",  # two cards have the name
        "NVIDIA GeForce RTX 3080 Ti Laptop GPU",
        "NVIDIA GeForce RTX 5060 Ti",
        "NVIDIA RTX A6000-48Q",
        "NVIDIA RTX A6000 Laptop GPU",
        "Quadro RTX 6000",
        "NVIDIA RTX 5000 Ada Generation",
        "NVIDIA RTX PRO 6000 Blackwell Server Edition MIG 1g.24gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "GRID A100-10C",
        "NVIDIA A40-48Q",
        "NVIDIA A10G",
        "NVIDIA A1000",
        "NVIDIA GB200",
        "NVIDIA T400 4GB",
        "Foo",
    ],
)
def test_another_or_an_unknown_gpu_has_no_peak(name: str) -> None:
    assert gpu_peak(name, "bf16") is None
    assert gpu_peak(name, "fp16") is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-SXM3-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla T4", 65),
    ],
)
def test_a_precision_without_a_figure_has_no_peak(name: str, tflops: float) -> None:
    peak = gpu_peak(name, "fp16")
    assert peak is not None
    assert peak.flops == tflops * 1e12
    assert gpu_peak(name, "bf16") is None
    assert gpu_peak("NVIDIA H100 80GB HBM3", "fp32") is None


@pytest.mark.parametrize("name", ["Tesla V100-FHHL-16GB", "Tesla V100S-PCIE-32GB", "NVIDIA T4G"])
def test_a_slower_or_faster_sister_has_no_peak(name: str) -> None:
    assert gpu_peak(name, "fp16") is None


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
    named = device_peak(torch.device("cpu"), "fp32")
    assert named is not None
    assert named.flops == peak
    assert named.source.startswith("measured: ")
    assert f"threads: {torch.get_num_threads()}" in named.source
    assert peak_flops(torch.device("meta"), "fp32") is None


def test_mfu() -> None:
    assert mfu(6e8, 1.2e9) == pytest.approx(0.5)
    assert mfu(None, 1.2e9) is None
    assert mfu(6e8, None) is None


def test_the_head_works_where_it_computes() -> None:
    parts = {"projections": 3.0, "attention": 2.0, "ffn": 4.0, "head": 10.0, "value head": 1.0}
    work = Work.of(Cost(flops_per_token_forward=20.0, parts=parts))
    assert work.flops(7, 7) == pytest.approx(3 * 20 * 7)
    assert work.flops(7, 2) == pytest.approx(3 * (9 * 7 + 11 * 2))
