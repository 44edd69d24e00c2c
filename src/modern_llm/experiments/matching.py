"""Arms on equal terms: the same tokens, parameters, training FLOPs or seconds as the reference."""

import torch

from modern_llm.config import ModelConfig, PipelineConfig
from modern_llm.errors import ConfigError
from modern_llm.models import ModernDecoderLM
from modern_llm.models.cost import Cost

TOLERANCE = 0.01  # of parameters
WIDTH_STEP = 8  # a feed-forward's width is a multiple of it, where that is close enough


def cost_of(config: ModelConfig, seq_len: int) -> Cost:
    """Parameters and FLOPs of a model that is not built."""
    with torch.device("meta"):
        return ModernDecoderLM(config).cost(seq_len)


def with_params_of(model: ModelConfig, reference: ModelConfig) -> ModelConfig:
    """``model`` with the feed-forward width that gives it the parameters of ``reference``.

    Raises:
        ConfigError: no width comes within 1 %.
    """
    wanted = _params(reference)
    if abs(_params(model) - wanted) <= TOLERANCE / 10 * wanted:
        return model
    narrow, wide = (_params(_with_width(model, width)) for width in (1, 2))
    per_width = wide - narrow  # parameters are a linear function of the width
    exact = 1 + (wanted - narrow) / per_width
    stepped, nearest = WIDTH_STEP * round(exact / WIDTH_STEP), round(exact)
    # Half of the tolerance for the first: any two arms are then within the whole of it.
    for width, share in ((stepped, TOLERANCE / 2), (nearest, TOLERANCE)):
        if width >= 1 and abs(narrow + (width - 1) * per_width - wanted) <= share * wanted:
            return _with_width(model, width)
    raise ConfigError(
        f"hold=params: {model.short_name} cannot have the {wanted:,} parameters of "
        f"{reference.short_name}: without its feed-forward it has {narrow - per_width:,}; "
        "change its width or depth"
    )


def _params(model: ModelConfig) -> int:
    return cost_of(model, 1).params


def _with_width(model: ModelConfig, width: int) -> ModelConfig:
    return model.model_copy(update={"d_ff": width})


def steps_at(config: PipelineConfig, reference: PipelineConfig, *, ratio: float) -> int:
    """Optimizer steps that give ``config`` the tokens of ``reference`` times ``ratio``."""
    own, other = config.pretrain.training, reference.pretrain.training
    tokens = other.max_steps * other.batch_size * other.seq_len * ratio
    return max(1, round(tokens / (own.batch_size * own.seq_len)))


def flops_ratio(config: PipelineConfig, reference: PipelineConfig) -> float:
    """Training FLOPs of a token of ``reference`` over those of one of ``config``."""
    own, other = (
        cost_of(c.model, c.pretrain.training.seq_len).flops_per_token_training
        for c in (config, reference)
    )
    return other / own
