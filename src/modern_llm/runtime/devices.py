"""Devices, ranks, precision and threads: what was asked for is applied or refused."""

import ctypes
import os
import platform
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from modern_llm.errors import ConfigError
from modern_llm.runtime.environment import cpu_name
from modern_llm.runtime.ranks import group, own_gpu

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str = "auto", *, field: str = "training.device") -> torch.device:
    """Device by name; ``auto`` takes CUDA, else MPS, else the CPU.

    Args:
        name: such as ``cpu``, ``cuda`` or ``cuda:1``.
        field: where the name was given, for the message.

    Raises:
        ConfigError: the device is unknown or not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return _own_cuda()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"{field}: unknown device '{name}' (auto, cpu, cuda)") from None
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise ConfigError(
            f"{field}: '{name}' is not available here; use {field}=cpu, "
            "or run on a machine that has it"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ConfigError(f"{field}: '{name}' is not here; the last of {count} is cuda:{count - 1}")
    return _own_cuda() if name == "cuda" else device


def _own_cuda() -> torch.device:
    """The GPU, or this rank's of several."""
    if not group().together:
        return torch.device("cuda")
    return torch.device("cuda", own_gpu(group().ranks))


def _has_bf16() -> bool:
    """Whether the GPU multiplies in bf16; all others can emulate it, slowly."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def check_precision(
    precision: str, device: torch.device, *, field: str = "training.precision"
) -> None:
    """Refuse a precision that the device cannot compute in; ``field`` is where it was given.

    Raises:
        ConfigError: unsupported; names one that works.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(f"{field}: fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if precision == "bf16" and device.type == "cuda" and not _has_bf16():
        raise ConfigError(f"{field}: this GPU has no bf16; use fp16 or fp32")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` as the precision that ``device`` has hardware for; any other name as it is.

    bf16 on GPUs and CPUs that multiply in it (AVX512-BF16, AMX), fp16 on older GPUs, else fp32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if _has_bf16() else "fp16"
    if device.type == "cpu" and platform.machine() == "x86_64":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16" if fast else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Autocast context for ``precision``; none for fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def set_threads(threads: int | None) -> None:
    """Use ``threads`` CPU threads for tensor operations; ``None`` keeps torch's choice."""
    if threads is not None:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, for the next step's tensors.

    By default it returns each large block to the kernel, which then clears its pages again: 6 to
    12 % of a bf16 training step on a CPU. The peak of memory does not change. Other C libraries
    are left as they are.
    """
    mmap_threshold, trim_threshold, mmap_max = -3, -1, -4  # malloc.h of glibc
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((mmap_threshold, 1 << 30), (trim_threshold, 1 << 30), (mmap_max, 0)):
        mallopt(option, value)


def hardware(device: torch.device) -> dict[str, Any]:
    """What computes: device, its name, CPU threads of torch and of the machine, memory in GB.

    Memory is that of the device; ``None`` where the system does not tell it.
    """
    name, memory = cpu_name(), None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory / 1e9
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    return {
        "device": str(device),
        "name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_gb": None if memory is None else round(memory, 1),
    }


def memory_gb(device: torch.device) -> float:
    """Memory in use in GB (1e9 bytes): allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except FileNotFoundError:  # not Linux
        return peak_memory_gb(device)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far in GB: allocated on a GPU, resident of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        # Not ru_maxrss: a process has its parent's, from before it was one of its own.
        with open("/proc/self/status") as file:
            return int(file.read().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    except (FileNotFoundError, IndexError):  # not Linux
        unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def memory_row(device: torch.device) -> dict[str, float]:
    """Memory now and at most, to log; on a GPU also what its allocator holds."""
    row = {"memory_gb": memory_gb(device), "memory_peak_gb": peak_memory_gb(device)}
    if device.type == "cuda":
        row["memory_reserved_gb"] = torch.cuda.memory_reserved(device) / 1e9
    return {name: round(value, 3) for name, value in row.items()}
