"""What is compared: kinds of models, and arms, which are a kind read through one cache."""

from dataclasses import dataclass

import torch

from modern_llm.config import ModelConfig
from modern_llm.errors import ConfigError
from modern_llm.models.decoder import Cache, ModernDecoderLM
from modern_llm.models.dims import Dims
from modern_llm.models.kv_cache import StreamingCache
from modern_llm.models.positions import POSITIONS, PositionEncoding

TRAINED = {  # kind -> what the study changes in the config's model, which has the window
    "full": {"attention": "full", "window": None, "n_sinks": 0, "sink": "none"},
    "window": {"n_sinks": 0, "sink": "none"},
    "window-learned": {"n_sinks": 0, "sink": "learned"},
}


@dataclass(frozen=True)
class Arm:
    """A kind of model and the keys that its cache keeps.

    Attributes:
        kind: of the model, see `kind_of`.
        keeps: ``all`` keys, the last ones (``recent``), or the first and the last (``sinks``).
        capacity: keys kept at most; None: all.
        n_sinks: first ones among them.
    """

    kind: str
    keeps: str
    capacity: int | None
    n_sinks: int = 0

    @property
    def name(self) -> str:
        """Name in files and of the arm's line in the plot: ``full/recent``."""
        return f"{self.kind}/{self.keeps}"

    @property
    def label(self) -> str:
        """What it is, for people: ``trained with full attention; cache: last 64``."""
        attention, _, sink = self.kind.partition("-")
        trained = {"full": "full attention"}.get(attention, "a window")
        trained += {"": "", "learned": " + learned sinks"}.get(sink, f" + {sink}")
        if self.capacity is None:
            return f"trained with {trained}; cache: all keys"
        recent = f"last {self.capacity - self.n_sinks}"
        kept = f"first {self.n_sinks} + {recent}" if self.n_sinks else recent
        return f"trained with {trained}; cache: {kept}"

    def new_cache(self, model: ModernDecoderLM, batch: int, n_tokens: int) -> Cache:
        """An empty cache for ``batch`` rows of ``n_tokens`` tokens."""
        if self.capacity is None:
            return model.new_cache(batch, n_tokens)
        return StreamingCache(self.capacity - self.n_sinks, self.n_sinks)


def kind_of(config: ModelConfig) -> str:
    """What a model was trained with: ``full``, ``window``, ``window-learned`` and so on."""
    parts = [config.attention, f"{config.n_sinks} streaming sinks" if config.n_sinks else ""]
    return "-".join([*filter(None, parts), *(["learned"] if config.sink == "learned" else [])])


def arms_of(config: ModelConfig, *, window: int, n_sinks: int) -> list[Arm]:
    """Arms of one model.

    A model with full attention is read with all keys, with its last ``window`` keys alone (what
    breaks in arXiv:2309.17453), and with as many of which the first ``n_sinks`` are the text's
    first: equal memory. A model with a window keeps what it was trained to see.
    """
    kind = kind_of(config)
    if config.attention == "full":
        return [
            Arm(kind, "all", None),
            Arm(kind, "recent", window),
            Arm(kind, "sinks", window, n_sinks),
        ]
    return [Arm(kind, "recent", window + config.n_sinks, config.n_sinks)]


def check_model(config: ModelConfig, where: str, *, window: int, n_tokens: int) -> None:
    """Refuse a model that cannot be read beyond its context, or not by the study's rules.

    Args:
        config: of the model.
        where: the checkpoint or the config, for the message.
        window: keys that a window of the study has.
        n_tokens: of the longest text.

    Raises:
        ConfigError: all reasons at once.
    """
    problems = []
    if config.attention == "linear":
        problems.append("attention=linear has no softmax, and so no sinks; use full or window")
    if "L" in config.window_pattern:
        problems.append(
            f"window_pattern={config.window_pattern}: layers without a window keep all keys; "
            "every layer must have it"
        )
    if config.window is not None and config.window != window:
        problems.append(
            f"its window is {config.window}, that of the study {window}; give "
            f"model.window={config.window}"
        )
    if window >= config.max_seq_len:
        problems.append(
            f"a window of {window} tokens hides nothing in a context of {config.max_seq_len}; "
            "give a smaller model.window"
        )
    if not reaches(config, n_tokens):
        problems.append(
            f"position encoding '{config.position.name}' ends at the context of "
            f"{config.max_seq_len} tokens, the texts have {n_tokens}; use rope (without yarn), "
            "alibi or none"
        )
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")


def reaches(config: ModelConfig, n_tokens: int) -> bool:
    """Whether positions up to ``n_tokens`` can be had and leave the trained ones as they were."""
    own, longer = _encoding(config), _encoding(stretched(config, n_tokens))
    if not (own.relative and longer.relative):
        return False
    pos_BT = torch.arange(config.max_seq_len)[None]
    x_BTNH = torch.ones(1, config.max_seq_len, 1, config.head_size)
    # YaRN's wavelengths follow the longest context, so a longer one turns the old positions too.
    turned = [e.rotate(x_BTNH, e.prepare(pos_BT)) for e in (own, longer)]
    added = [b for e in (own, longer) if (b := e.bias(pos_BT, pos_BT)) is not None]
    return all(torch.equal(pair[0], pair[1]) for pair in (turned, added) if pair)


def _encoding(config: ModelConfig) -> PositionEncoding:
    encoding: PositionEncoding = POSITIONS.build(config.position, Dims.of(config))
    return encoding


def stretched(config: ModelConfig, n_tokens: int) -> ModelConfig:
    """The same model for texts of ``n_tokens``: no weight depends on it."""
    return config.model_copy(update={"max_seq_len": max(n_tokens, config.max_seq_len)})
