"""How fast the hardware could be, and what share of that a run reaches (MFU).

MFU is the model FLOPs of the formula (not those of recomputation) over the peak of the device
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B). The peak of a CPU is measured; that of a GPU
is the dense figure of its data sheet; an unknown GPU has none, and the MFU is not shown.
"""

import functools
import re
import resource
import sys
import time

import torch

from modern_llm.runtime.devices import DTYPES

NVIDIA = "https://www.nvidia.com/en-us/data-center"
GPU_TFLOPS = (
    # pattern of the device name, dense TFLOP/s with float32 accumulation, dtypes, source
    (r"\bB200\b", 2250.0, ("bf16", "fp16"), f"{NVIDIA}/dgx-b200/"),
    (r"\bGH200\b", 989.0, ("bf16", "fp16"), f"{NVIDIA}/grace-hopper-superchip/"),
    (r"\bH200 NVL\b", 835.5, ("bf16", "fp16"), f"{NVIDIA}/h200/"),
    (r"\bH200\b", 989.0, ("bf16", "fp16"), f"{NVIDIA}/h200/"),
    (r"\bH100 NVL\b", 835.5, ("bf16", "fp16"), f"{NVIDIA}/h100/"),
    (r"\bH100 PCIe\b", 756.0, ("bf16", "fp16"), f"{NVIDIA}/h100/"),
    (r"\bH100\b", 989.0, ("bf16", "fp16"), f"{NVIDIA}/h100/"),
    (r"\bA100\b", 312.0, ("bf16", "fp16"), f"{NVIDIA}/a100/"),
    (r"\bA40\b", 149.7, ("bf16", "fp16"), f"{NVIDIA}/a40/"),
    (r"\bA30\b", 165.0, ("bf16", "fp16"), f"{NVIDIA}/products/a30-gpu/"),
    (r"\bL40S\b", 362.05, ("bf16", "fp16"), f"{NVIDIA}/l40s/"),
    (r"\bL4\b", 121.0, ("bf16", "fp16"), f"{NVIDIA}/l4/"),
    (r"\bT4\b", 65.0, ("fp16",), f"{NVIDIA}/tesla-t4/"),
    (r"\bV100-PCIE\b", 112.0, ("fp16",), f"{NVIDIA}/v100/"),
    (r"\bV100\b", 125.0, ("fp16",), f"{NVIDIA}/v100/"),
    (
        r"\bRTX 4090\b(?! D| Laptop)",
        165.2,
        ("bf16", "fp16"),
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
)


def gpu_peak_flops(name: str, precision: str) -> float | None:
    """Dense peak in FLOP/s of a GPU by its device name; ``None`` when it is not in the table."""
    for pattern, tflops, precisions, _ in GPU_TFLOPS:
        if re.search(pattern, name):
            return tflops * 1e12 if precision in precisions else None
    return None


@functools.cache
def cpu_peak_flops(precision: str, threads: int, seconds: float = 0.3) -> float:
    """Measured peak in FLOP/s of a square matrix product on ``threads`` threads.

    The best of all products within ``seconds``, after one to warm up; measured once a process.
    """
    size = 1024
    left, right = torch.randn(2, size, size).to(DTYPES[precision])
    best_s, end = float("inf"), 0.0
    torch.mm(left, right)
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        torch.mm(left, right)
        best_s = min(best_s, time.perf_counter() - begin)
    return 2.0 * size**3 / best_s


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak in FLOP/s of ``device`` at ``precision``, or ``None`` when it is not known.

    The random state is not touched.
    """
    if device.type == "cuda":
        return gpu_peak_flops(torch.cuda.get_device_name(device), precision)
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            return cpu_peak_flops(precision, torch.get_num_threads())
    return None


def mfu(tokens_per_s: float, flops_per_token: float | None, peak: float | None) -> float | None:
    """Share of the peak that is reached, or ``None`` when either figure is not known.

    Args:
        tokens_per_s: trained tokens a second.
        flops_per_token: FLOPs of forward and backward for one token.
        peak: FLOP/s of the device.
    """
    if flops_per_token is None or peak is None:
        return None
    return tokens_per_s * flops_per_token / peak


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GB (1e9 bytes): allocated on a GPU, resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
