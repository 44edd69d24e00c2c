"""The choice by device and dtype."""

import torch
from torch import Tensor

from modern_llm.models.kernels.base import KERNELS, Kernel
from modern_llm.models.kernels.blocks import BlockKernel
from modern_llm.models.kernels.manual import ManualKernel
from modern_llm.models.kernels.sdpa import SDPAKernel


@KERNELS.register("auto")
class AutoKernel:
    """The fastest for the device and dtype: ``blocks`` for bfloat16 on a CPU, else ``sdpa``.

    Capped logits have no fused kernel: ``blocks`` computes them, or ``manual`` beyond bfloat16.
    """

    refuses: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.sdpa, self.blocks, self.manual = SDPAKernel(), BlockKernel(), ManualKernel()

    def __call__(
        self,
        q_BNTH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        bias: Tensor | None = None,
        *,
        is_causal: bool = False,
        sink_N: Tensor | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        """As in `Kernel`."""
        kernel: Kernel = self.manual if softcap else self.sdpa
        if q_BNTH.device.type == "cpu" and q_BNTH.dtype is torch.bfloat16:
            kernel = self.blocks
        return kernel(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            bias,
            is_causal=is_causal,
            sink_N=sink_N,
            dropout=dropout,
            softcap=softcap,
        )

    def flops(
        self, n_heads: int, head_size: int, n_keys: int, *, sink: bool, is_causal: bool = True
    ) -> float:
        """Those of ``sdpa``: the same model costs the same on every device."""
        return self.sdpa.flops(n_heads, head_size, n_keys, sink=sink)
