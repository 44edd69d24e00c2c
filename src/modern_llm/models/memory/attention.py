"""What attention keeps, from the queries, keys and values to the input of its last matrix.

A kernel's sums are those of the modules in ``models/kernels/``, and where torch has several kernels
behind one call, of the one that it takes.
"""

from collections.abc import Callable
from typing import Any

from modern_llm.config import ModelConfig
from modern_llm.models.attention import LinearAttention
from modern_llm.models.kernels import BlockKernel, SDPAKernel
from modern_llm.models.masks import Window
from modern_llm.models.memory.passes import FP32, Pass, dropped
from modern_llm.models.positions import POSITIONS, PositionEncoding


def attention(config: ModelConfig, step: Pass, layer: int) -> float:
    """Bytes of one layer, those that its first matrix reads left out."""
    if config.attention == "linear":
        return _linear_attention(config, step)
    kernel = _kernel(config, step)
    letter = config.window_pattern[layer % len(config.window_pattern)]
    window = None
    if config.attention == "window" and letter == "S" and step.seq_len > (config.window or 0):
        window = Window(config.window or 0, config.n_sinks)
    biased = _has_bias(config)
    if window is None or (step.masked and config.n_sinks):
        shapes = [(step.seq_len, step.seq_len)]
        causal = window is None and not step.masked and not biased
    else:
        shapes = [(p.n_queries, p.n_keys) for p in window.pieces(step.seq_len, step.seq_len)]
        causal = False
    kept = sum(kernel(config, step, queries, keys, causal) for queries, keys in shapes)
    if kernel is _fused and repeats(config, step):
        size = config.head_size + (SDPAKernel.sink_width if config.sink == "learned" else 0)
        repeated = sum(keys for _, keys in shapes)
        kept += 2 * step.number * step.rows * config.n_heads * size * repeated
    heads, keys_values = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    c, n = step.number, step.tokens
    product, turned = c * n * (heads + 2 * keys_values), c * n * (heads + keys_values)
    apart = rotates(config) or config.qk_norm  # else queries and keys are views of the product
    if kernel is _fused and len(shapes) == 1 and config.sink == "none":
        return kept + product + turned * apart  # values are a view of the product in any case
    if kernel is _fused and len(shapes) > 1:
        kept += c * n * heads  # the pieces put together, for the last matrix
        if config.sink == "none":  # with one, queries are longer copies
            kept += turned if apart else product
    return kept + product * (config.qk_norm and not step.casts)  # what the norms read


def rotates(config: ModelConfig) -> bool:
    """Whether queries and keys are turned by their position."""
    encoding: Any = POSITIONS[config.position.name]
    return encoding.rotate is not PositionEncoding.rotate


def _has_bias(config: ModelConfig) -> bool:
    encoding: Any = POSITIONS[config.position.name]
    return encoding.bias is not PositionEncoding.bias


Kernel = Callable[[ModelConfig, Pass, int, int, bool], float]


def _kernel(config: ModelConfig, step: Pass) -> Kernel:
    """Sums of the kernel that computes."""
    name = config.attention_backend
    if name == "auto":
        name = "manual" if config.softcap else "sdpa"
        if not step.on_gpu and step.casts:
            name = "blocks"
    if name == "sdpa" and not step.on_gpu and step.dropout and config.dropout:
        return _plain  # the CPU's fused kernel has no dropout
    return {"manual": _manual, "blocks": _blocks}.get(name, _fused)


def repeats(config: ModelConfig, step: Pass) -> bool:
    """Whether keys and values are repeated for every head, see `kernels.sdpa.takes_groups`."""
    if not step.on_gpu or config.n_heads == config.n_kv_heads:
        return False
    hides = step.masked or config.attention == "window" or config.sink == "learned"
    return hides or _has_bias(config) or not step.casts


def _weights(config: ModelConfig, step: Pass, queries: int, keys: int) -> float:
    """Numbers of the attention weights."""
    return float(step.rows * config.n_heads * queries * keys)


def _fused(config: ModelConfig, step: Pass, queries: int, keys: int, causal: bool) -> float:
    """Output and the logarithm of the denominators; a sink's or a piece's copies of the inputs."""
    c, rows, heads, size = step.number, step.rows, config.n_heads, config.head_size
    kept = float(FP32 * rows * heads * queries)
    if config.sink == "learned":
        longer, keys = size + SDPAKernel.sink_width, keys + 1
        kept += c * rows * longer * (2 * heads * queries + 2 * config.n_kv_heads * keys)
        if queries == step.seq_len:  # pieces are put together anyway
            kept += c * rows * heads * queries * size  # the output without the coordinate
        bias_heads = heads if _has_bias(config) else 1
        return kept + c * (rows if step.masked else 1) * bias_heads * queries * keys
    kept += c * rows * heads * queries * size
    if queries < step.seq_len:
        kept += 2 * c * rows * config.n_kv_heads * keys * size
    if _has_bias(config) and step.casts:  # a copy a layer
        kept += c * (rows if step.masked else 1) * heads * queries * keys
    return kept


def _plain(config: ModelConfig, step: Pass, queries: int, keys: int, causal: bool) -> float:
    """Torch's own written-out attention: float32, queries' heads for keys and values too."""
    copies = FP32 * step.rows * config.n_heads * config.head_size * (queries + 2 * keys)
    weights = _weights(config, step, queries, keys)
    kept = copies + FP32 * weights
    if step.dropout and config.dropout:
        kept += dropped(step, weights, FP32) + FP32 * weights
    return kept + step.number * step.rows * config.n_heads * config.head_size * queries


def _manual(config: ModelConfig, step: Pass, queries: int, keys: int, causal: bool) -> float:
    c, weights = step.number, _weights(config, step, queries, keys)
    per_head = config.n_heads * config.head_size
    kept = c * step.rows * per_head * (2 * queries + 2 * keys) + FP32 * weights
    kept += c * weights if step.casts or config.sink == "learned" else 0.0
    kept += FP32 * weights if config.softcap else 0.0
    kept += queries * keys if causal else 0.0  # the mask, in bytes
    if step.dropout and config.dropout:
        kept += dropped(step, weights, c) + c * weights
    return kept


def _blocks(config: ModelConfig, step: Pass, queries: int, keys: int, causal: bool) -> float:
    c, size = step.number, config.head_size
    sets = 1 + (config.softcap is not None)
    kept, block = 0.0, BlockKernel.block_size
    for start in range(0, queries, block):
        end = min(start + block, queries)
        seen = end if causal else keys
        weights = _weights(config, step, end - start, seen)
        kept += sets * c * weights + 2 * c * step.rows * config.n_kv_heads * size * seen
        if step.dropout and config.dropout:
            kept += dropped(step, weights, c) + c * weights
    return kept + 2 * c * step.rows * config.n_heads * size * queries  # queries, and the output


def _linear_attention(config: ModelConfig, step: Pass) -> float:
    """Features and sums in float32; see `LinearAttention`."""
    n, heads, kv, size = step.tokens, config.n_heads, config.n_kv_heads, config.head_size
    both = (heads + kv) * size
    product = FP32 * n * (both + kv * size)
    kept = FP32 * n * both if step.casts or config.qk_norm else product  # the features' source
    kept += product * (config.qk_norm and not step.casts)
    kept += FP32 * n * (both + heads * size + 2 * heads) + step.number * n * heads * size
    if step.masked:
        return kept + FP32 * step.rows * step.seq_len**2 * (heads + 1) + FP32 * n * 2 * both
    chunk = min(LinearAttention.chunk_size, step.seq_len)
    chunks = -(-step.seq_len // chunk)
    filled = step.rows * chunks * chunk
    kept += FP32 * filled * (4 * heads + 2 * kv) * size + FP32 * n * kv * size
    return kept + FP32 * step.rows * chunks * heads * (chunk**2 + size**2)


def shared_masks(config: ModelConfig, step: Pass) -> float:
    """Biases of the logits that one layer after the other is given."""
    if config.attention == "linear" or _kernel(config, step) is not _fused:
        return 0.0
    rows, length = step.rows if step.masked else 1, step.seq_len
    heads, number = (config.n_heads, FP32) if _has_bias(config) else (1, step.number)
    if config.sink == "learned" or (_has_bias(config) and step.casts):
        return 0.0  # each layer has a copy
    kept = 0.0
    letters = set(config.window_pattern)
    if config.attention == "window" and "S" in letters and length > (config.window or 0):
        pieces = Window(config.window or 0, config.n_sinks).pieces(length, length)
        shapes = [(p.n_queries, p.n_keys) for p in pieces]
        if not step.masked and not _has_bias(config):
            shapes = list(dict.fromkeys(shapes))  # equal masks are one tensor
        kept += sum(number * rows * heads * queries * keys for queries, keys in shapes)
        letters.discard("S")
    if (config.attention == "full" or letters) and (step.masked or _has_bias(config)):
        kept += number * rows * heads * length**2
    return kept
