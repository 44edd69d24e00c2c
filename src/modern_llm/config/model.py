"""Sizes and component choices of one decoder."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WithJsonSchema,
    model_validator,
)

from modern_llm.config.schema import Component, Schema, count_of

# Three matrices, so their default width is 8/3 of d_model; their nonlinearity is their own. That no
# gated feed-forward of `modern_llm.models` is missing here is tested there.
GATED_FFNS = ("swiglu", "geglu")
OWN_ACTIVATION = (*GATED_FFNS, "relu2")  # feed-forwards that take no `activation`
DEFAULT_ACTIVATION = "gelu"

ALIASES = {
    "n_embd": "d_model",
    "hidden_size": "d_model",
    "n_layer": "n_layers",
    "num_layers": "n_layers",
    "n_head": "n_heads",
    "num_heads": "n_heads",
    "block_size": "max_seq_len",
    "normalization": "norm",
    "norm_type": "norm",
    "position_encoding": "position",
    "pos_type": "position",
    "ffn_type": "ffn",
    "attention_type": "attention",
    "weight_tying": "tie_embeddings",
}
NAMES = {  # field -> what other projects call its choices -> what they are called here
    "attention": {
        "flash_attention": "full",
        "local_window": "window",
        "local_window_attention": "window",
        "linear_attention": "linear",
    },
    "ffn": {
        "ff_standard": "standard",
        "ff_swiglu": "swiglu",
        "ff_geglu": "geglu",
        "ff_relu2": "relu2",
        "ff_moe": "moe",
        "mlp": "standard",
    },
    "norm": {
        "rms": "rmsnorm",
        "rms_norm": "rmsnorm",
        "ln": "layernorm",
        "layer_norm": "layernorm",
        "layer_norm_nobias": "layernorm_nobias",
        "scale_norm": "scalenorm",
    },
    "position": {
        "learned_absolute": "learned",
        "absolute": "learned",
        "rotary": "rope",
        "nope": "none",
    },
    "activation": {"gelu_new": "gelu_tanh", "swish": "silu"},
}
WIDTH_RULES = ("4x", "8/3", "equal_params", "equal_flops")
WIDTH = {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"enum": list(WIDTH_RULES)}]}
HEADS = {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]}
DEFAULT_EXPERTS = 8
SHORT = {  # in `ModelConfig.short_name`; any other component is named in full
    "rope": "RoPE",
    "alibi": "ALiBi",
    "learned": "Learned",
    "sinusoidal": "Sinus",
    "none": "NoPos",
    "rmsnorm": "RMS",
    "layernorm": "LN",
    "layernorm_nobias": "LNnoBias",
    "scalenorm": "Scale",
    "swiglu": "SwiGLU",
    "geglu": "GeGLU",
    "relu2": "ReLU2",
    "gelu": "GELU",
    "gelu_tanh": "GELU",
    "relu": "ReLU",
    "leaky_relu": "LeakyReLU",
    "silu": "SiLU",
}


class MoEConfig(Schema):
    """Mixture of experts in place of the feed-forward; each expert has width ``d_ff``."""

    n_experts: PositiveInt
    top_k: PositiveInt = 2
    balance_coef: float = Field(0.01, ge=0)  # weight of the load-balance loss
    every: PositiveInt = 1  # 1: all layers; 2: every second, the last of each two

    @model_validator(mode="after")
    def _check_top_k(self) -> Self:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k} exceeds n_experts={self.n_experts}")
        return self


class ModelConfig(Schema):
    """Sizes and component choices of one decoder; every size is a count."""

    vocab_size: PositiveInt  # rows of the embedding; the tokenizer may have fewer ids
    d_model: PositiveInt
    n_layers: PositiveInt
    n_heads: PositiveInt
    n_kv_heads: Annotated[PositiveInt, WithJsonSchema(HEADS)]  # default, or null: n_heads
    d_ff: Annotated[
        PositiveInt, WithJsonSchema(WIDTH)
    ]  # a width, or a rule (see `width_of`); default: 4x, of a gated one 8/3
    max_seq_len: PositiveInt  # longest context in tokens
    norm: Component = Component("rmsnorm")
    norm_position: Literal["pre", "post"] = "pre"
    norm_eps: PositiveFloat = 1e-5
    position: Component = Component("rope")
    attention: Literal["full", "window", "linear"] = "full"
    attention_backend: str = "auto"  # how attention is computed
    softcap: PositiveFloat | None = None  # attention logits are kept below it, smoothly
    window: PositiveInt | None = None  # keys that a query sees, itself included
    window_pattern: str = Field("S", pattern="^[SL]+$")  # S: a layer with the window, L: without
    n_sinks: NonNegativeInt = 0  # first tokens that stay visible beside the window
    sink: Literal["none", "learned"] = "none"  # learned: a logit per head in the denominator
    ffn: Component = Component("swiglu")
    activation: str = DEFAULT_ACTIVATION  # of the standard feed-forward
    moe: MoEConfig | None = None
    qk_norm: bool = False
    bias: bool = False
    tie_embeddings: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    init_std: PositiveFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = canonical_names(value)
        # What is wrong with these two is told there: then any default will do.
        heads, width = (count_of(value.get(name)) or 1 for name in ("n_heads", "d_model"))
        if value.get("n_kv_heads") is None:
            value["n_kv_heads"] = heads
        ffn = value.get("ffn", "swiglu")
        name = ffn.get("name", "swiglu") if isinstance(ffn, dict) else getattr(ffn, "name", ffn)
        rule = value.get("d_ff", "8/3" if name in GATED_FFNS else "4x")
        if isinstance(rule, str) and count_of(rule) is None:
            value["d_ff"] = width_of(rule, width, name, value.get("moe"))
        return value

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        """Report every broken size rule at once, each with a choice that works."""
        problems = []
        if self.d_model % self.n_heads:
            fits = [n for n in range(1, self.d_model + 1) if self.d_model % n == 0]
            near = sorted(fits, key=lambda n: abs(n - self.n_heads))[:4]
            problems.append(
                f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}: "
                f"use n_heads from {sorted(near)}"
            )
        if self.n_heads % self.n_kv_heads:
            fits = [k for k in range(1, self.n_heads + 1) if self.n_heads % k == 0]
            problems.append(f"n_kv_heads={self.n_kv_heads} must divide n_heads: use one of {fits}")
        if self.attention == "window" and self.window is None:
            problems.append("attention=window needs window=<tokens>")
        if self.attention != "window" and self._given("window", "n_sinks", "window_pattern"):
            problems.append("window, n_sinks and window_pattern need attention=window")
        if self.attention == "linear" and (
            given := self._given("sink", "softcap", "attention_backend")
        ):
            problems.append(
                f"attention=linear has no softmax and no kernels: leave out {', '.join(given)}"
            )
        if self.window is not None and self.window + self.n_sinks > self.max_seq_len:
            problems.append(
                f"window + n_sinks = {self.window + self.n_sinks} exceeds "
                f"max_seq_len={self.max_seq_len}"
            )
        if self.moe is not None and self.moe.every > self.n_layers:
            problems.append(
                f"moe.every={self.moe.every} exceeds n_layers={self.n_layers}: no layer has experts"
            )
        if self.ffn.name in OWN_ACTIVATION and self.activation != DEFAULT_ACTIVATION:
            problems.append(
                f"activation={self.activation} has no effect with ffn={self.ffn.name}, which has "
                f"its own; leave it at {DEFAULT_ACTIVATION}, or use ffn=standard"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _given(self, *names: str) -> list[str]:
        """Those of the fields that are not at their default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]

    @property
    def short_name(self) -> str:
        """Sizes and components in one word, such as ``6L-6H-384D-RoPE-RMS-SwiGLU-PreNorm``."""
        heads = (
            f"{self.n_heads}H"
            if self.n_kv_heads == self.n_heads
            else (f"{self.n_heads}H{self.n_kv_heads}KV")
        )
        ffn = SHORT.get(self.ffn.name, self.ffn.name)
        if self.ffn.name == "standard":
            ffn = SHORT.get(self.activation, self.activation)
        parts = [
            f"{self.n_layers}L-{heads}-{self.d_model}D",
            SHORT.get(self.position.name, self.position.name),
            SHORT.get(self.norm.name, self.norm.name),
            ffn if self.moe is None else f"{ffn}x{self.moe.n_experts}",
            "PreNorm" if self.norm_position == "pre" else "PostNorm",
        ]
        if self.attention == "window":
            pattern = self.window_pattern if "L" in self.window_pattern else ""
            parts.append(f"Window{self.window}{pattern}")
        if self.attention == "linear":
            parts.append("Linear")
        flags = (("QKNorm", self.qk_norm), ("Sink", self.sink != "none"), ("Cap", self.softcap))
        return "-".join([*parts, *(name for name, on in flags if on)])

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


def width_of(rule: str, d_model: int, ffn: str, moe: Any = None) -> int:
    """Hidden width of a feed-forward by a rule.

    ``4x`` and ``8/3`` are multiples of ``d_model``, the second rounded up to a multiple of 32.
    ``equal_params`` and ``equal_flops`` give a layer the parameters, or a token the FLOPs, of a
    standard feed-forward of ``4x``, to the next multiple of 8: they divide by the matrices of
    ``ffn``, and by the experts that there are, or that a token uses.

    Args:
        rule: one of these four.
        d_model: width of the model.
        ffn: name of the feed-forward.
        moe: section of the experts, if any.

    Raises:
        ValueError: no such rule.
    """
    if rule == "4x":
        return 4 * d_model
    if rule == "8/3":
        return -(-8 * d_model // 96) * 32
    counts = {"equal_params": ("n_experts", DEFAULT_EXPERTS), "equal_flops": ("top_k", 2)}
    if rule not in counts:
        raise ValueError(f"d_ff='{rule}' is neither a width nor a rule ({', '.join(WIDTH_RULES)})")
    field, default = counts[rule]
    experts = 1
    if moe is not None:
        given = moe.get(field) if isinstance(moe, dict) else getattr(moe, field, None)
        experts = count_of(given) or default
    matrices = (3 if ffn in GATED_FFNS else 2) * experts
    return max(8, round(d_model / matrices) * 8)


def canonical_names(section: dict[str, Any]) -> dict[str, Any]:
    """``section`` of a model config with the aliases of other projects put right.

    Raises:
        ValueError: a field is given twice, under two names.
    """
    named: dict[str, Any] = {}
    for key, value in section.items():
        name = ALIASES.get(key, key)
        if name in named:
            raise ValueError(f"'{key}' and '{name}' are the same field; give it once")
        named[name] = _canonical_choice(name, value)
    ffn = named.get("ffn")
    if (ffn if isinstance(ffn, str) else isinstance(ffn, dict) and ffn.get("name")) == "moe":
        options = {k: v for k, v in ffn.items() if k != "name"} if isinstance(ffn, dict) else {}
        named["ffn"] = options.pop("expert", "swiglu")
        section = named.get("moe") or {}
        named["moe"] = {"n_experts": DEFAULT_EXPERTS, **dict(section), **options}
    return named


def _canonical_choice(field: str, value: Any) -> Any:
    """A choice of a field, or the name in it, under the name that it has here."""
    names = NAMES.get(field, {})
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return {**value, "name": names.get(value["name"], value["name"])}
    return value
