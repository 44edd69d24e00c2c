"""What a decoder keeps in memory from its forward to its backward, added up from its parts.

Autograd keeps what a gradient needs, by storage: a view keeps all of what it is a view of, and two
operators that keep one tensor keep it once. The sums below follow the modules line by line.

n is the tokens of a micro-batch, c the bytes of a number in matrix products (2 under autocast, else
4); the residual stream and norms are in float32. Compiled blocks keep less: these are the sums of
eager ones, and so a bound.
"""

from dataclasses import dataclass

from modern_llm.config import ModelConfig
from modern_llm.models.ffn import ACTIVATIONS, FFNS
from modern_llm.models.memory.attention import attention, rotates, shared_masks
from modern_llm.models.memory.passes import FP32, INT64, Pass, dropped
from modern_llm.models.norms import NORMS

LOSS_PEAK = 3 * FP32  # a logit in the loss's backward: log-softmax, its gradient, that of the logit


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps, parameters and copies of them left out.

    Attributes:
        parts: kept by all layers, by kind.
        blocks: kept by each layer; they are what ``parts`` has, in another order.
        inputs: of the blocks, all layers: what checkpointing keeps of them.
        around: kept outside of the blocks: embedding, last norm, masks, tables.
        loss: kept by the loss.
        loss_forward: in use when it has just been computed.
        loss_peak: in use while the loss's backward begins, with what is kept.
        gradients: of activations, while a block's backward begins.
        notes: what is remarkable of these sums, or only estimated.
    """

    parts: dict[str, float]
    blocks: tuple[float, ...]
    inputs: float
    around: float
    loss: float
    loss_forward: float
    loss_peak: float
    gradients: float
    notes: tuple[str, ...] = ()

    def kept(self, *, checkpointing: bool = False) -> float:
        """All that is kept when the backward begins."""
        return self.around + self.loss + (self.inputs if checkpointing else sum(self.blocks))

    def moments(self, *, checkpointing: bool = False) -> dict[str, tuple[float, float]]:
        """Activations and loss at the moments that can be the most expensive.

        ``forward``: the loss has just been computed. ``loss``: its backward begins. ``block``: that
        of the last block does, its activations computed once more with checkpointing.
        """
        kept = self.around + (self.inputs if checkpointing else sum(self.blocks))
        again = max(self.blocks) if checkpointing else 0.0
        return {
            "forward": (kept, self.loss_forward),
            "loss": (kept, self.loss_peak),
            "block": (kept + again + self.gradients, 0.0),
        }


def activations(config: ModelConfig, step: Pass) -> Activations:
    """What ``config``'s decoder and its loss keep of one micro-batch."""
    n, width = step.tokens, config.d_model
    layers = [_layer(config, step, layer) for layer in range(config.n_layers)]
    parts: dict[str, float] = {}
    for layer in layers:
        for name, size in layer.items():
            parts[name] = parts.get(name, 0.0) + size
    around = _around(config, step)
    loss, loss_forward, loss_peak = _loss(config, step)
    return Activations(
        parts,
        tuple(sum(layer.values()) for layer in layers),
        inputs=float(config.n_layers * FP32 * n * width),
        around=around,
        loss=loss,
        loss_forward=loss_forward,
        loss_peak=loss_peak,
        gradients=float(n * (FP32 * width + step.number * config.d_ff * _rows_of_ffn(config))),
        notes=tuple(_notes(config, step)),
    )


def _layer(config: ModelConfig, step: Pass, layer: int) -> dict[str, float]:
    """Bytes by kind of one block."""
    n, width, c = step.tokens, config.d_model, step.number
    norms = 2 * _norm(config.norm.name, step, n, width, holds_input=True)
    mixing = c * n * width + attention(config, step, layer)  # what the first matrix reads
    if config.qk_norm:
        heads = n * (config.n_heads + config.n_kv_heads)
        norms += _norm(config.norm.name, step, heads, config.head_size, holds_input=step.casts)
    found = {"norms": norms, "attention": mixing, "feed-forward": _feed_forward(config, step)}
    if config.moe is not None and (layer + 1) % config.moe.every == 0:
        found["feed-forward"] = 0.0
        found["experts"] = _experts(config, step)
    if step.dropout and config.dropout:
        found["dropout"] = 2 * dropped(step, n * width, step.number)
    return found


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


# --- around the blocks, and the loss


def _around(config: ModelConfig, step: Pass) -> float:
    """Ids, tables of positions, masks that all layers share, the last norm."""
    n, width, length = step.tokens, config.d_model, step.seq_len
    kept = float(INT64 * n)
    if config.norm_position == "pre":
        kept += _norm(config.norm.name, step, n, width, holds_input=True)
    if rotates(config):
        kept += 2 * FP32 * (n if step.masked else length) * config.head_size
    if step.dropout and config.dropout:
        kept += dropped(step, n * width, FP32)
    return kept + shared_masks(config, step)


def _loss(config: ModelConfig, step: Pass) -> tuple[float, float, float]:
    """Kept by head and loss; in use at the end of their forward, and as their backward begins."""
    scored = step.tokens if step.scored is None else min(step.scored, step.tokens)
    read = float(step.number * scored * config.d_model)
    if step.loss_chunk:  # both gradients are made in the forward
        head = config.vocab_size * config.d_model
        chunk = min(step.loss_chunk, scored) * config.vocab_size
        kept = read + FP32 * head
        each = LOSS_PEAK + step.number * step.casts  # with the gradient of the chunk before
        return kept, kept + read + each * chunk, kept
    logits = float(scored * config.vocab_size)
    forward = read + (2 * FP32 + step.number * step.casts) * logits
    return read + FP32 * logits + INT64 * scored, forward, read + LOSS_PEAK * logits


KNOWN = {  # components that have sums above; others are counted as the first
    "norm": ("layernorm", "layernorm_nobias", "rmsnorm", "scalenorm"),
    "ffn": ("swiglu", "geglu", "standard", "relu2"),
}


def _notes(config: ModelConfig, step: Pass) -> list[str]:
    """Components from elsewhere, and attention that holds all its weights on a GPU."""
    chosen = {"norm": NORMS.resolve(config.norm.name), "ffn": FFNS.resolve(config.ffn.name)}
    notes = [
        f"{field} '{name}' is counted as {KNOWN[field][0]}"
        for field, name in chosen.items()
        if name not in KNOWN[field]
    ]
    return notes
