"""What a decoder keeps in memory from its forward to its backward, added up from its parts.

Autograd keeps what a gradient needs, by storage: a view keeps all of what it is a view of, and two
operators that keep one tensor keep it once. The sums below follow the modules line by line.

n is the tokens of a micro-batch, c the bytes of a number in matrix products (2 under autocast, else
4); the residual stream and norms are in float32. Compiled blocks keep less: these are the sums of
eager ones, and so a bound.
"""

from collections.abc import Callable
from dataclasses import dataclass

from modern_llm.config import ModelConfig
from modern_llm.models.attention import LinearAttention
from modern_llm.models.ffn import ACTIVATIONS, FFNS
from modern_llm.models.kernels import BlockKernel, SDPAKernel
from modern_llm.models.masks import Window
from modern_llm.models.norms import NORMS
from modern_llm.models.positions import POSITIONS, PositionEncoding

FP32, INT64 = 4, 8  # bytes
LOSS_PEAK = 3 * FP32  # a logit in the loss's backward: log-softmax, its gradient, that of the logit


@dataclass(frozen=True)
class Pass:
    """One forward pass of a micro-batch.

    Attributes:
        rows: of the micro-batch.
        seq_len: tokens of a row.
        number: bytes of a number in matrix products.
        on_gpu: kernels of CUDA, else those of a CPU.
        masked: a mask hides more than the future: documents in a row, preference pairs.
        dropout: it is in training mode, with dropout if the model has any.
        scored: tokens at which the head computes; ``None``: all.
        loss_chunk: tokens whose logits stand at once; 0: all.
    """

    rows: int
    seq_len: int
    number: int = FP32
    on_gpu: bool = True
    masked: bool = False
    dropout: bool = True
    scored: int | None = None
    loss_chunk: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch, padding counted."""
        return self.rows * self.seq_len

    @property
    def casts(self) -> bool:
        """Whether autocast copies what matrix products read."""
        return self.number < FP32


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps, parameters and copies of them left out.

    Attributes:
        parts: kept by all layers, by kind.
        blocks: kept by each layer; they are what ``parts`` has, in another order.
        inputs: of the blocks, all layers: what checkpointing keeps of them.
        around: kept outside of the blocks: embedding, last norm, masks, tables.
        loss: kept by the loss.
        loss_peak: in use while the loss's backward begins, with what is kept.
        gradients: of activations, while a block's backward begins.
        estimated: components that have no sums of their own here, and what they are taken for.
    """

    parts: dict[str, float]
    blocks: tuple[float, ...]
    inputs: float
    around: float
    loss: float
    loss_peak: float
    gradients: float
    estimated: tuple[str, ...] = ()

    def kept(self, *, checkpointing: bool = False) -> float:
        """All that is kept when the backward begins."""
        return self.around + self.loss + (self.inputs if checkpointing else sum(self.blocks))

    def peak(self, *, checkpointing: bool = False) -> tuple[float, float]:
        """Activations and loss at the more expensive of two moments of the backward.

        The loss's backward begins, all being kept; or that of the last block does, its activations
        computed once more with checkpointing.
        """
        kept = self.around + (self.inputs if checkpointing else sum(self.blocks))
        again = max(self.blocks) if checkpointing else 0.0
        in_block = kept + again + self.gradients
        return (kept, self.loss_peak) if kept + self.loss_peak >= in_block else (in_block, 0.0)


def activations(config: ModelConfig, step: Pass) -> Activations:
    """What ``config``'s decoder and its loss keep of one micro-batch."""
    n, width = step.tokens, config.d_model
    layers = [_layer(config, step, layer) for layer in range(config.n_layers)]
    parts: dict[str, float] = {}
    for layer in layers:
        for name, size in layer.items():
            parts[name] = parts.get(name, 0.0) + size
    around = _around(config, step)
    loss, loss_peak = _loss(config, step)
    return Activations(
        parts,
        tuple(sum(layer.values()) for layer in layers),
        inputs=float(config.n_layers * FP32 * n * width),
        around=around,
        loss=loss,
        loss_peak=loss_peak,
        gradients=float(n * (FP32 * width + step.number * config.d_ff * _rows_of_ffn(config))),
        estimated=tuple(_estimated(config)),
    )


def _layer(config: ModelConfig, step: Pass, layer: int) -> dict[str, float]:
    """Bytes by kind of one block."""
    n, width, c = step.tokens, config.d_model, step.number
    norms = 2 * _norm(config.norm.name, step, n, width, holds_input=True)
    attention = c * n * width + _attention(config, step, layer)  # what the first matrix reads
    if config.qk_norm:
        heads = n * (config.n_heads + config.n_kv_heads)
        norms += _norm(config.norm.name, step, heads, config.head_size, holds_input=step.casts)
    found = {"norms": norms, "attention": attention, "feed-forward": _feed_forward(config, step)}
    if config.moe is not None and (layer + 1) % config.moe.every == 0:
        found["feed-forward"] = 0.0
        found["experts"] = _experts(config, step)
    if step.dropout and config.dropout:
        found["dropout"] = 2 * _dropped(step, n * width, step.number)
    return found


def _dropped(step: Pass, count: float, number: int) -> float:
    """The mask of a dropout: a byte on a GPU, a factor in its input's dtype on a CPU."""
    return count * (1 if step.on_gpu else number)


# --- norms: the input in float32, statistics, and on a CPU the normalised input


def _norm(name: str, step: Pass, rows: float, width: int, *, holds_input: bool) -> float:
    own, canonical = FP32 * rows * width, NORMS.resolve(name)
    kept = own if holds_input else 0.0
    if canonical == "rmsnorm":
        return kept + FP32 * rows + (0.0 if step.on_gpu else own)
    if canonical == "scalenorm":
        return kept + own + 2 * FP32 * rows
    return kept + 2 * FP32 * rows  # mean and deviation


# --- feed-forwards: rows of F numbers, by what the nonlinearity and the last matrix need


def _rows_of_hidden(config: ModelConfig) -> int:
    """Numbers that are kept a token and hidden unit."""
    name = FFNS.resolve(config.ffn.name)
    if name == "standard":  # ReLU needs its output only, which the last matrix keeps anyway
        return 1 if ACTIVATIONS.resolve(config.activation) == "relu" else 2
    return 2 if name == "relu2" else 4  # gate and up, the gate's value, their product


def _rows_of_ffn(config: ModelConfig) -> int:
    """Rows a token that go through a feed-forward."""
    return 1 if config.moe is None else config.moe.top_k


def _feed_forward(config: ModelConfig, step: Pass) -> float:
    hidden = _rows_of_hidden(config) * config.d_ff
    return float(step.number * step.tokens * (config.d_model + hidden))


def _experts(config: ModelConfig, step: Pass) -> float:
    """Router, its choices, and ``top_k`` rows a token: read, put out, and weighted."""
    assert config.moe is not None
    n, c, k, width = step.tokens, step.number, config.moe.top_k, config.d_model
    rows = n * k
    hidden = _rows_of_hidden(config) * config.d_ff
    router = c * n * width + FP32 * n * config.moe.n_experts
    choices = rows * (3 * INT64 + 2 * FP32) + FP32 * n
    biases = 2 * INT64 * rows if config.bias else 0
    return router + choices + biases + c * rows * (3 * width + hidden)


# --- attention


def _attention(config: ModelConfig, step: Pass, layer: int) -> float:
    """From the queries, keys and values to the input of the last matrix, which is kept too."""
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
    heads, keys_values = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    c, n = step.number, step.tokens
    if kernel is _fused:  # queries and keys are views of what the rotation made, or of the product
        turned = config.position.name != "none" and _rotates(config)
        apart = turned or config.qk_norm
        if len(shapes) > 1:
            kept += c * n * ((heads + keys_values) if apart else (heads + 2 * keys_values))
            kept += c * n * heads  # the pieces put together, for the last matrix
        elif not _copies_inputs(config):
            kept += c * n * (heads + 2 * keys_values + (heads + keys_values) * apart)
    return kept


def _rotates(config: ModelConfig) -> bool:
    return POSITIONS[config.position.name].rotate is not PositionEncoding.rotate


def _has_bias(config: ModelConfig) -> bool:
    return POSITIONS[config.position.name].bias is not PositionEncoding.bias


def _copies_inputs(config: ModelConfig) -> bool:
    """The fused kernel with a learned sink reads longer copies."""
    return config.sink == "learned"


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
    if name == "sdpa" and step.on_gpu and config.n_heads != config.n_kv_heads:
        # Fused kernels of CUDA take a mask or grouped heads, not both.
        if step.masked or config.attention == "window" or _has_bias(config):
            return _plain
    return {"manual": _manual, "blocks": _blocks}.get(name, _fused)


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
    """torch's own written-out attention: float32, queries' heads for keys and values too."""
    copies = FP32 * step.rows * config.n_heads * config.head_size * (queries + 2 * keys)
    weights = _weights(config, step, queries, keys)
    kept = copies + FP32 * weights
    if step.dropout and config.dropout:
        kept += _dropped(step, weights, FP32) + FP32 * weights
    return kept + step.number * step.rows * config.n_heads * config.head_size * queries


def _manual(config: ModelConfig, step: Pass, queries: int, keys: int, causal: bool) -> float:
    c, weights = step.number, _weights(config, step, queries, keys)
    per_head = config.n_heads * config.head_size
    kept = c * step.rows * per_head * (2 * queries + 2 * keys) + FP32 * weights
    kept += c * weights if step.casts or config.sink == "learned" else 0.0
    kept += FP32 * weights if config.softcap else 0.0
    kept += queries * keys if causal else 0.0  # the mask, in bytes
    if step.dropout and config.dropout:
        kept += _dropped(step, weights, c) + c * weights
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
            kept += _dropped(step, weights, c) + c * weights
    return kept + 2 * c * step.rows * config.n_heads * size * queries  # queries, and the output


def _linear_attention(config: ModelConfig, step: Pass) -> float:
    """Features and sums in float32; see `LinearAttention`."""
    n, heads, kv, size = step.tokens, config.n_heads, config.n_kv_heads, config.head_size
    both = (heads + kv) * size
    kept = FP32 * n * (both if step.casts else both + kv * size)  # what the features are made of
    kept += FP32 * n * (both + heads * size + 2 * heads) + step.number * n * heads * size
    if step.masked:
        return kept + FP32 * step.rows * step.seq_len**2 * (heads + 1) + FP32 * n * 2 * both
    chunk = min(LinearAttention.chunk_size, step.seq_len)
    chunks = -(-step.seq_len // chunk)
    filled = step.rows * chunks * chunk
    kept += FP32 * filled * (4 * heads + 2 * kv) * size + FP32 * n * kv * size
    return kept + FP32 * step.rows * chunks * heads * (chunk**2 + size**2)


# --- around the blocks, and the loss


def _around(config: ModelConfig, step: Pass) -> float:
    """Ids, tables of positions, masks that all layers share, the last norm."""
    n, width, length = step.tokens, config.d_model, step.seq_len
    kept = float(INT64 * n)
    if config.norm_position == "pre":
        kept += _norm(config.norm.name, step, n, width, holds_input=True)
    if _rotates(config):
        kept += 2 * FP32 * (n if step.masked else length) * config.head_size
    if step.dropout and config.dropout:
        kept += _dropped(step, n * width, FP32)
    return kept + _shared_masks(config, step)


def _shared_masks(config: ModelConfig, step: Pass) -> float:
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


def _loss(config: ModelConfig, step: Pass) -> tuple[float, float]:
    """Kept by head and loss, and in use while the loss's backward begins."""
    scored = step.tokens if step.scored is None else min(step.scored, step.tokens)
    read = step.number * scored * config.d_model
    if step.loss_chunk:  # both gradients are made in the forward
        chunk = min(step.loss_chunk, scored)
        kept = read + FP32 * config.vocab_size * config.d_model
        return kept, kept + (LOSS_PEAK + step.number) * chunk * config.vocab_size
    logits = float(scored * config.vocab_size)
    kept = read + FP32 * logits + INT64 * scored
    return kept, read + LOSS_PEAK * logits


def _estimated(config: ModelConfig) -> list[str]:
    """Components from elsewhere: their class has no sums above."""
    known = {
        "norm": (
            config.norm.name,
            NORMS,
            ("rmsnorm", "layernorm", "layernorm_nobias", "scalenorm"),
        ),
        "ffn": (config.ffn.name, FFNS, ("standard", "relu2", "swiglu", "geglu")),
    }
    taken_for = {"norm": "layernorm", "ffn": "swiglu"}
    return [
        f"{field} '{name}' is counted as {taken_for[field]}"
        for field, (name, registry, names) in known.items()
        if registry.resolve(name) not in names
    ]
