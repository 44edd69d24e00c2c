"""torch's fused attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modern_llm.models.kernels.base import KERNELS


@KERNELS.register("sdpa")
class SDPAKernel:
    """``torch.nn.functional.scaled_dot_product_attention``: fused kernels where there are some.

    A learned sink becomes one more key, seen by all, whose logit with every query is the sink
    and whose value is zero: heads grow by a coordinate that holds the sink's logit in queries, 1
    in that key and 0 in all others. This is exact, has the right gradient for the sink (a mask
    with a gradient would leave the fused kernels) and works when query heads share keys.
    """

    refuses: tuple[str, ...] = ("softcap",)
    sink_width = 8  # heads grow by 8, not 1: fused kernels want multiples of 8

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
        head_size = q_BNTH.shape[-1]
        if sink_N is not None:
            q_BNTH, k_BKSH, v_BKSH, bias = self._with_sink(
                q_BNTH, k_BKSH, v_BKSH, bias, is_causal, sink_N
            )
        if bias is not None:
            bias = bias.to(q_BNTH.dtype)
        group = q_BNTH.shape[1] // k_BKSH.shape[1]
        if group > 1 and not takes_groups(q_BNTH, bias):
            k_BKSH, v_BKSH = (x.repeat_interleave(group, dim=1) for x in (k_BKSH, v_BKSH))
        out_BNTH = F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH,
            v_BKSH,
            attn_mask=bias,
            dropout_p=dropout,
            is_causal=is_causal and sink_N is None,
            scale=1 / math.sqrt(head_size),
            enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1],
        )
        return out_BNTH[..., :head_size]

    def _with_sink(
        self,
        q_BNTH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        bias: Tensor | None,
        is_causal: bool,
        sink_N: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Inputs grown by the sink's coordinate and by the sink as key 0."""
        n_queries, head_size = q_BNTH.shape[-2:]
        coordinate_N = (sink_N * math.sqrt(head_size)).to(q_BNTH.dtype)
        coordinate = coordinate_N[:, None, None].expand(*q_BNTH.shape[:-1], 1)
        q_BNTH = F.pad(torch.cat([q_BNTH, coordinate], -1), (0, self.sink_width - 1))
        sink_key = torch.zeros_like(q_BNTH[0, 0, 0])
        sink_key[head_size] = 1.0
        k_BKSH = F.pad(k_BKSH, (0, self.sink_width))
        k_BKSH = torch.cat([sink_key.expand(*k_BKSH.shape[:2], 1, -1), k_BKSH], -2)
        v_BKSH = F.pad(v_BKSH, (0, self.sink_width, 1, 0))
        if bias is not None:
            bias = F.pad(bias, (1, 0))
        elif is_causal:
            future = torch.ones(n_queries, n_queries + 1, dtype=torch.bool, device=q_BNTH.device)
            bias = torch.zeros_like(future, dtype=q_BNTH.dtype)
            bias = bias.masked_fill(future.triu(2), float("-inf"))
        return q_BNTH, k_BKSH, v_BKSH, bias

    def flops(
        self, n_heads: int, head_size: int, n_keys: int, *, sink: bool, is_causal: bool = True
    ) -> float:
        """Two products of S x H a head; a sink adds one key and 8 coordinates."""
        if sink:
            return 4.0 * n_heads * (head_size + self.sink_width) * (n_keys + 1)
        return 4.0 * n_heads * head_size * n_keys


def takes_groups(q_BNTH: Tensor, bias: Tensor | None) -> bool:
    """Whether a fused kernel takes fewer heads of keys than of queries.

    On CUDA flash attention alone does, and it takes neither masks nor float32: without a fused
    kernel all logits would stand in memory (see ``enable_gqa`` of torch's documentation).
    """
    half = q_BNTH.dtype in (torch.bfloat16, torch.float16)
    return q_BNTH.device.type != "cuda" or (half and bias is None)
