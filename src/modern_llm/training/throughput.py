"""How fast the hardware could be, and what share of that a run reaches (MFU).

MFU is the model FLOPs of the formula (not those of recomputation) over the peak of the device
(Chowdhery et al. 2022, arXiv:2204.02311, appendix B). The peak of a CPU is measured; that of a GPU
is the dense figure of its data sheet; an unknown GPU has none, and the MFU is not shown.
"""

import functools
import re
import time
from dataclasses import dataclass

import torch

from modern_llm.models.cost import Cost
from modern_llm.runtime.devices import DTYPES

ASSUMED_MFU = 0.4  # share of the device's peak that an estimate made beforehand counts on

BOTH = ("bf16", "fp16")
NVIDIA = "https://www.nvidia.com/en-us/data-center"
IMAGES = "https://images.nvidia.com/aem-dam"
A10 = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/datasheet-new/"
    "nvidia-a10-datasheet.pdf"
)
AMPERE = (
    "https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf"
)
ADA = f"{IMAGES}/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"
ADA_PRO = (
    f"{IMAGES}/en-zz/Solutions/technologies/NVIDIA-ADA-GPU-PROVIZ-Architecture-Whitepaper_1.1.pdf"
)
BLACKWELL = f"{IMAGES}/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf"
BLACKWELL_PRO = (
    "https://www.nvidia.com/content/dam/en-zz/Solutions/design-visualization/"
    "quadro-product-literature/NVIDIA-RTX-Blackwell-PRO-GPU-Architecture-v1.0.pdf"
)
# What follows a whole name makes it another card (Laptop, SUPER, D, a slice of a GPU), so patterns
# end where the name does. GeForce cards multiply at half their rate when they add up in float32.
# The RTX 3080 is left out: two cards, of 68 and of 70 multiprocessors, have that name.
GPU_TFLOPS = (
    # pattern of the device name, dense TFLOP/s with float32 accumulation, dtypes, source
    (r"\bB200$", 2250.0, BOTH, f"{NVIDIA}/dgx-b200/"),
    (r"\bGH200 \d+GB?( HBM3e)?$", 989.0, BOTH, f"{NVIDIA}/grace-hopper-superchip/"),
    (r"\bH200 NVL$", 835.5, BOTH, f"{NVIDIA}/h200/"),
    (r"\bH200$", 989.0, BOTH, f"{NVIDIA}/h200/"),
    (r"\bH100 NVL$", 835.5, BOTH, f"{NVIDIA}/h100/"),
    (r"\bH100 PCIe$", 756.0, BOTH, f"{NVIDIA}/h100/"),
    (r"\bH100 80GB HBM3$", 989.0, BOTH, f"{NVIDIA}/h100/"),
    (r"\bA100-(SXM4?|PCIE)-(40|80)GB$", 312.0, BOTH, f"{NVIDIA}/a100/"),
    (r"\bA100 80GB PCIe$", 312.0, BOTH, f"{NVIDIA}/a100/"),
    (r"\bA40$", 149.7, BOTH, f"{NVIDIA}/a40/"),
    (r"\bA30$", 165.0, BOTH, f"{NVIDIA}/products/a30-gpu/"),
    (r"\bA10$", 125.0, BOTH, A10),
    (r"\bL40S$", 362.05, BOTH, f"{NVIDIA}/l40s/"),
    (r"\bL4$", 121.0, BOTH, f"{NVIDIA}/l4/"),
    (r"\bT4$", 65.0, ("fp16",), f"{NVIDIA}/tesla-t4/"),
    (r"\bV100-PCIE-\d+GB$", 112.0, ("fp16",), f"{NVIDIA}/v100/"),
    (r"\bV100-SXM[23]-\d+GB$", 125.0, ("fp16",), f"{NVIDIA}/v100/"),
    (r"\bRTX PRO 6000 Blackwell Workstation Edition$", 503.8, BOTH, BLACKWELL_PRO),
    (r"\bRTX PRO 6000 Blackwell Max-Q Workstation Edition$", 438.9, BOTH, BLACKWELL_PRO),
    (r"\bRTX 6000 Ada Generation$", 364.2, BOTH, ADA_PRO),
    (r"\bRTX A6000$", 154.8, BOTH, AMPERE),
    (r"\bGeForce RTX 5090$", 209.5, BOTH, BLACKWELL),
    (r"\bGeForce RTX 5080$", 112.6, BOTH, BLACKWELL),
    (r"\bGeForce RTX 5070 Ti$", 87.9, BOTH, BLACKWELL),
    (r"\bGeForce RTX 5070$", 61.7, BOTH, BLACKWELL),
    (r"\bGeForce RTX 4090$", 165.2, BOTH, ADA),
    (r"\bGeForce RTX 4080$", 97.5, BOTH, ADA),
    (r"\bGeForce RTX 4070 Ti$", 80.2, BOTH, BLACKWELL),
    (r"\bGeForce RTX 4070$", 58.3, BOTH, BLACKWELL),
    (r"\bGeForce RTX 3090 Ti$", 80.0, BOTH, ADA),
    (r"\bGeForce RTX 3090$", 71.0, BOTH, AMPERE),
)
CPU_PRODUCT_SIZE = 1024  # rows and columns of the product that is timed


@dataclass(frozen=True)
class Peak:
    """What a device can do at most.

    Attributes:
        flops: FLOP/s.
        source: data sheet, or how it was measured.
    """

    flops: float
    source: str


def gpu_peak(name: str, precision: str) -> Peak | None:
    """Dense peak of a GPU by its device name; ``None`` when it is not in the table."""
    for pattern, tflops, precisions, source in GPU_TFLOPS:
        if re.search(pattern, name):
            return Peak(tflops * 1e12, source) if precision in precisions else None
    return None


@functools.cache
def cpu_peak_flops(precision: str, threads: int, seconds: float = 0.3) -> float:
    """Measured peak in FLOP/s of a square matrix product on ``threads`` threads.

    The best of all products within ``seconds``, after one to warm up; measured once a process.
    """
    size = CPU_PRODUCT_SIZE
    left, right = torch.randn(2, size, size).to(DTYPES[precision])
    best_s, end = float("inf"), 0.0
    torch.mm(left, right)
    end = time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        torch.mm(left, right)
        best_s = min(best_s, time.perf_counter() - begin)
    return 2.0 * size**3 / best_s


def device_peak(device: torch.device, precision: str) -> Peak | None:
    """Peak of ``device`` at ``precision`` and where it is from, or ``None``: it is not known.

    The random state is not touched.
    """
    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), precision)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        with torch.random.fork_rng(devices=[]):
            flops = cpu_peak_flops(precision, threads)
        size = CPU_PRODUCT_SIZE
        return Peak(flops, f"measured: {size} x {size} {precision} product, threads: {threads}")
    return None


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak in FLOP/s of ``device`` at ``precision``, or ``None`` when it is not known."""
    peak = device_peak(device, precision)
    return None if peak is None else peak.flops


@dataclass(frozen=True)
class Work:
    """FLOPs of training on one token, forward and backward.

    Attributes:
        body: of each token, without the head.
        head: of each token at which the head computes: answers alone, in some stages.
    """

    body: float
    head: float

    @classmethod
    def of(cls, cost: Cost) -> "Work":
        """The work that a model's cost comes to."""
        head = cost.flops_per_token_training * cost.head_flops / cost.flops_per_token_forward
        return cls(cost.flops_per_token_training - head, head)

    def flops(self, tokens: int, scored: int) -> float:
        """FLOPs of ``tokens`` tokens, of which the head sees ``scored``."""
        return self.body * tokens + self.head * scored


def mfu(flops_per_s: float | None, peak: float | None) -> float | None:
    """Share of the peak that is reached, or ``None`` when either figure is not known.

    Args:
        flops_per_s: model FLOPs done a second.
        peak: FLOP/s of the device.
    """
    return None if flops_per_s is None or peak is None else flops_per_s / peak
