"""Attention kernels: softmax(q k^T / sqrt(H) + bias) v, the same values by different means.

To add one: a class with ``refuses``, ``__call__`` and ``flops`` as in `Kernel`, and a name.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from modern_llm.errors import ConfigError
from modern_llm.registry import Registry

KERNELS = Registry("attention backend")


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """``softcap tanh(logits / softcap)``, or the logits as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class Kernel(Protocol):
    """One way to compute attention.

    Attributes:
        refuses: parameters below that it cannot serve, of ``dropout`` and ``softcap``.
    """

    refuses: tuple[str, ...]

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
        """Attention output ``(B, N, T, H)``; K divides N.

        Args:
            q_BNTH: queries.
            k_BKSH: keys.
            v_BKSH: values.
            bias: added to the logits, broadcastable to ``(B, N, T, S)``.
            is_causal: query t sees keys 0..t; only with T = S and no bias.
            sink_N: a learned logit a head that joins the softmax's denominator, has no value
                and is not scaled (gpt-oss, arXiv:2508.10925).
            dropout: probability with which an attention weight is dropped.
            softcap: keeps logits between -softcap and softcap, smoothly, before the bias:
                ``softcap tanh(logit / softcap)`` (Gemma 2, arXiv:2408.00118, sec. 2); the sink's
                logit is not capped.
        """

    def flops(self, n_heads: int, head_size: int, seq_len: int, *, sink: bool) -> float:
        """Forward FLOPs of one query against ``seq_len`` keys, all heads together."""


@KERNELS.register("manual")
class ManualKernel:
    """Written out, with logits and softmax in float32; holds all T x S logits in memory."""

    refuses: tuple[str, ...] = ()

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
        group = q_BNTH.shape[1] // k_BKSH.shape[1]
        k_BNSH, v_BNSH = (
            x.repeat_interleave(group, 1) if group > 1 else x for x in (k_BKSH, v_BKSH)
        )
        logit_BNTS = (q_BNTH / math.sqrt(q_BNTH.shape[-1])) @ k_BNSH.transpose(-2, -1)
        if logit_BNTS.dtype is not torch.float64:
            logit_BNTS = logit_BNTS.float()
        logit_BNTS = _capped(logit_BNTS, softcap)
        if is_causal:
            future = torch.ones_like(logit_BNTS[0, 0], dtype=torch.bool).triu(1)
            logit_BNTS = logit_BNTS.masked_fill(future, float("-inf"))
        if bias is not None:
            logit_BNTS = logit_BNTS + bias
        n_keys = logit_BNTS.shape[-1]
        if sink_N is not None:
            sink_BNT1 = sink_N.to(logit_BNTS)[:, None, None].expand(*logit_BNTS.shape[:-1], 1)
            logit_BNTS = torch.cat([logit_BNTS, sink_BNT1], -1)
        weight_BNTS = logit_BNTS.softmax(-1)[..., :n_keys].to(v_BNSH.dtype)
        if dropout:
            weight_BNTS = F.dropout(weight_BNTS, dropout)
        return weight_BNTS @ v_BNSH

    def flops(self, n_heads: int, head_size: int, seq_len: int, *, sink: bool) -> float:
        """Two products of S x H a head: logits, and weights times values."""
        return 4.0 * n_heads * head_size * seq_len


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

    def flops(self, n_heads: int, head_size: int, seq_len: int, *, sink: bool) -> float:
        """Two products of S x H a head; a sink adds one key and 8 coordinates."""
        if sink:
            return 4.0 * n_heads * (head_size + self.sink_width) * (seq_len + 1)
        return 4.0 * n_heads * head_size * seq_len


@KERNELS.register("blocks")
class BlockKernel:
    """Plain products, a block of queries at a time against the keys that it can see.

    For bfloat16 on a CPU: torch's fused kernel computes in float32 there and takes two to seven
    times as long, forward and backward. The softmax is in float32, its logits and weights are
    kept in the dtype of the inputs; all T x S weights stay in memory for the backward.
    """

    refuses: tuple[str, ...] = ()
    block_size = 256  # queries; products of fewer are slower than the keys that they spare

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
        n_queries, n_keys = q_BNTH.shape[2], k_BKSH.shape[2]
        blocks = []
        for start in range(0, n_queries, self.block_size):
            end = min(start + self.block_size, n_queries)
            seen = end if is_causal else n_keys
            mask = bias
            if is_causal:
                future = torch.ones(end - start, seen, dtype=torch.bool, device=q_BNTH.device)
                mask = torch.zeros_like(future, dtype=q_BNTH.dtype)
                mask = mask.masked_fill(future.triu(1 + start), float("-inf"))
            elif bias is not None:
                mask = bias[..., start:end, :] if bias.shape[-2] > 1 else bias
            q_BNLH, k, v = q_BNTH[:, :, start:end], k_BKSH[:, :, :seen], v_BKSH[:, :, :seen]
            blocks.append(self._attend(q_BNLH, k, v, mask, sink_N, dropout, softcap))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)

    def _attend(
        self,
        q_BNLH: Tensor,
        k_BKSH: Tensor,
        v_BKSH: Tensor,
        mask: Tensor | None,
        sink_N: Tensor | None,
        dropout: float,
        softcap: float | None,
    ) -> Tensor:
        """One block: the query heads that share keys are rows of one product."""
        shape, n_keys = q_BNLH.shape, k_BKSH.shape[2]
        q_GMH, k_GSH, v_GSH = (
            x.reshape(k_BKSH.shape[0] * k_BKSH.shape[1], -1, shape[-1])
            for x in (q_BNLH, k_BKSH, v_BKSH)
        )
        scale = 1 / math.sqrt(shape[-1])
        if (
            mask is not None and mask.ndim == 2 and not softcap
        ):  # the same for all rows and heads: added for free
            mask = mask.to(q_GMH.dtype).repeat(q_GMH.shape[1] // mask.shape[0], 1)
            logit = torch.baddbmm(mask, q_GMH, k_GSH.transpose(1, 2), alpha=scale)
            logit_BNLS = logit.view(*shape[:3], n_keys)
        else:
            logit_BNLS = torch.bmm(q_GMH * scale, k_GSH.transpose(1, 2)).view(*shape[:3], n_keys)
            logit_BNLS = _capped(logit_BNLS, softcap)
            if mask is not None:
                logit_BNLS = logit_BNLS + mask.to(logit_BNLS.dtype)
        if sink_N is not None:
            sink_BNL1 = sink_N.to(logit_BNLS)[:, None, None].expand(*shape[:3], 1)
            logit_BNLS = torch.cat([logit_BNLS, sink_BNL1], -1)
        weight_BNLS = logit_BNLS.softmax(-1)[..., :n_keys]
        if dropout:
            weight_BNLS = F.dropout(weight_BNLS, dropout)
        weight_GMS = weight_BNLS.reshape(q_GMH.shape[0], -1, n_keys)
        return torch.bmm(weight_GMS, v_GSH).view(shape)

    def flops(self, n_heads: int, head_size: int, seq_len: int, *, sink: bool) -> float:
        """Two products a block against the keys up to its end; the mean over all queries."""
        full, rest = divmod(seq_len, self.block_size)
        pairs = self.block_size**2 * full * (full + 1) / 2 + rest * seq_len
        return 4.0 * n_heads * head_size * pairs / seq_len


@KERNELS.register("flex")
class FlexKernel:
    """``torch.nn.attention.flex_attention``: compiled on a GPU; on a CPU forward only, and slow.

    A learned sink is worked in afterwards, from the logarithm of the softmax's denominator: the
    output times ``sigmoid(lse - sink)``.
    """

    refuses: tuple[str, ...] = ("dropout",)

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
        """As in `Kernel`.

        Raises:
            ConfigError: a gradient is wanted on a CPU.
        """
        on_cpu = q_BNTH.device.type == "cpu"
        if on_cpu and torch.is_grad_enabled() and q_BNTH.requires_grad:
            raise ConfigError(
                "model.attention_backend=flex has no backward on a CPU; use auto to train here"
            )
        shape = (q_BNTH.shape[0], q_BNTH.shape[1], q_BNTH.shape[2], k_BKSH.shape[2])
        bias_BNTS = None if bias is None else bias.expand(shape)

        def changed(logit: Tensor, b: Tensor, n: Tensor, t: Tensor, s: Tensor) -> Tensor:
            logit = _capped(logit, softcap)
            if is_causal:
                logit = torch.where(s <= t, logit, float("-inf"))
            return logit if bias_BNTS is None else logit + bias_BNTS[b, n, t, s]

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            out_BNTH, aux = _flex(compiled=not on_cpu)(
                q_BNTH,
                k_BKSH,
                v_BKSH,
                score_mod=changed,
                scale=1 / math.sqrt(q_BNTH.shape[-1]),
                enable_gqa=q_BNTH.shape[1] != k_BKSH.shape[1],
                return_aux=AuxRequest(lse=True),
            )
        if sink_N is None:
            return out_BNTH  # type: ignore[no-any-return]
        kept_BNT = torch.sigmoid(aux.lse - sink_N.to(aux.lse)[:, None])
        return out_BNTH * kept_BNT.unsqueeze(-1).to(out_BNTH.dtype)  # type: ignore[no-any-return]

    def flops(self, n_heads: int, head_size: int, seq_len: int, *, sink: bool) -> float:
        """Two products of S x H a head."""
        return 4.0 * n_heads * head_size * seq_len


@cache
def _flex(*, compiled: bool) -> Callable[..., Any]:
    return torch.compile(flex_attention) if compiled else flex_attention  # type: ignore[return-value]


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

    def flops(self, n_heads: int, head_size: int, seq_len: int, *, sink: bool) -> float:
        """Those of ``sdpa``: the same model costs the same on every device."""
        return self.sdpa.flops(n_heads, head_size, seq_len, sink=sink)
