"""GPUs by short name: memory, and the device name by which `throughput` knows their peak.

Memory is that of the data sheet, in GB of 1e9 bytes; the card itself shows some percent more, as it
counts in GiB.
"""

from dataclasses import dataclass

from modern_llm.errors import ConfigError
from modern_llm.training.throughput import (
    A10,
    ADA,
    ADA_PRO,
    AMPERE,
    BLACKWELL,
    BLACKWELL_PRO,
    NVIDIA,
    gpu_peak,
)


@dataclass(frozen=True)
class GPU:
    """One card.

    Attributes:
        device: its name as CUDA tells it.
        memory_gb: in 1e9 bytes.
        source: data sheet of the memory.
    """

    device: str
    memory_gb: float
    source: str

    def peak_flops(self, precision: str) -> float | None:
        """Dense FLOP/s, or ``None``: the data sheet has no figure for the precision."""
        peak = gpu_peak(self.device, precision)
        return None if peak is None else peak.flops

    @property
    def precision(self) -> str:
        """What ``precision=auto`` is on it."""
        return "fp16" if gpu_peak(self.device, "bf16") is None else "bf16"


GPUS = {
    "b200": GPU("NVIDIA B200", 180, f"{NVIDIA}/dgx-b200/"),  # 1,440 GB of eight
    "gh200-96gb": GPU("NVIDIA GH200 480GB", 96, f"{NVIDIA}/grace-hopper-superchip/"),
    "gh200-144gb": GPU("NVIDIA GH200 144G HBM3e", 144, f"{NVIDIA}/grace-hopper-superchip/"),
    "h200": GPU("NVIDIA H200", 141, f"{NVIDIA}/h200/"),
    "h200-nvl": GPU("NVIDIA H200 NVL", 141, f"{NVIDIA}/h200/"),
    "h100": GPU("NVIDIA H100 80GB HBM3", 80, f"{NVIDIA}/h100/"),
    "h100-nvl": GPU("NVIDIA H100 NVL", 94, f"{NVIDIA}/h100/"),
    "h100-pcie": GPU("NVIDIA H100 PCIe", 80, f"{NVIDIA}/h100/"),
    "a100-80gb": GPU("NVIDIA A100-SXM4-80GB", 80, f"{NVIDIA}/a100/"),
    "a100-40gb": GPU("NVIDIA A100-SXM4-40GB", 40, f"{NVIDIA}/a100/"),
    "a40": GPU("NVIDIA A40", 48, f"{NVIDIA}/a40/"),
    "a30": GPU("NVIDIA A30", 24, f"{NVIDIA}/products/a30-gpu/"),
    "a10": GPU("NVIDIA A10", 24, A10),
    "l40s": GPU("NVIDIA L40S", 48, f"{NVIDIA}/l40s/"),
    "l4": GPU("NVIDIA L4", 24, f"{NVIDIA}/l4/"),
    "t4": GPU("Tesla T4", 16, f"{NVIDIA}/tesla-t4/"),
    "v100-16gb": GPU("Tesla V100-SXM2-16GB", 16, f"{NVIDIA}/v100/"),
    "v100-32gb": GPU("Tesla V100-SXM2-32GB", 32, f"{NVIDIA}/v100/"),
    "rtx-pro-6000": GPU("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 96, BLACKWELL_PRO),
    "rtx6000-ada": GPU("NVIDIA RTX 6000 Ada Generation", 48, ADA_PRO),
    "rtx-a6000": GPU("NVIDIA RTX A6000", 48, AMPERE),
    "rtx5090": GPU("NVIDIA GeForce RTX 5090", 32, BLACKWELL),
    "rtx5080": GPU("NVIDIA GeForce RTX 5080", 16, BLACKWELL),
    "rtx5070ti": GPU("NVIDIA GeForce RTX 5070 Ti", 16, BLACKWELL),
    "rtx5070": GPU("NVIDIA GeForce RTX 5070", 12, BLACKWELL),
    "rtx4090": GPU("NVIDIA GeForce RTX 4090", 24, ADA),
    "rtx4080": GPU("NVIDIA GeForce RTX 4080", 16, ADA),
    "rtx4070ti": GPU("NVIDIA GeForce RTX 4070 Ti", 12, BLACKWELL),
    "rtx4070": GPU("NVIDIA GeForce RTX 4070", 12, BLACKWELL),
    "rtx3090ti": GPU("NVIDIA GeForce RTX 3090 Ti", 24, ADA),
    "rtx3090": GPU("NVIDIA GeForce RTX 3090", 24, AMPERE),
}
ALIASES = {"gh200": "gh200-96gb", "h100-sxm": "h100", "h200-sxm": "h200", "a6000": "rtx-a6000"}


def gpu_named(name: str) -> tuple[str, GPU]:
    """Short name and card of ``name``, in whatever case, with ``-``, ``_`` or a blank.

    Raises:
        ConfigError: no such card, or a name of several; has the list.
    """
    plain = _plain(name)
    known = {_plain(key): key for key in GPUS} | {_plain(k): v for k, v in ALIASES.items()}
    if plain in known:
        return known[plain], GPUS[known[plain]]
    several = [key for key in GPUS if _plain(key).startswith(plain)]
    if plain and len(several) > 1:
        raise ConfigError(f"--gpu {name}: which of {', '.join(several)}?")
    raise ConfigError(f"--gpu {name}: unknown; the table has {', '.join(GPUS)}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
