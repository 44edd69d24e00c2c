"""Every component is on the page of its kind, and the costs told there are those of the models."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from modern_llm.config import ModelConfig
from modern_llm.models import ACTIVATIONS, FFNS, KERNELS, NORMS, POSITIONS, ModernDecoderLM
from modern_llm.models.attention import ATTENTIONS
from modern_llm.models.cost import Cost
from modern_llm.models.kv_cache import KVCache, StateCache
from modern_llm.registry import Registry
from modern_llm.training.optim import OPTIMIZERS
from modern_llm.training.schedule import SCHEDULES

DOCS = Path(__file__).resolve().parents[2] / "docs"
TABLE = re.compile(r"<!-- cost: (\w+) -->\n\|.*\n\|[ -|]*\n((?:\|.*\n)+)")
CODE = re.compile(r"`([^`]+)`")
ROWS = [
    (page.name, part, *CODE.findall(line))
    for page in sorted(DOCS.glob("*.md"))
    for part, lines in TABLE.findall(page.read_text(encoding="utf-8"))
    for line in lines.splitlines()
]
PAGES = {
    "attention.md": (ATTENTIONS, KERNELS),
    "feed_forward.md": (FFNS, ACTIVATIONS),
    "normalization.md": (NORMS,),
    "positions.md": (POSITIONS,),
    "training_loop.md": (OPTIMIZERS, SCHEDULES),
}
SIZES = (  # two, so that no wrong formula is right by chance
    {"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    | {"d_ff": 80, "max_seq_len": 48},
    {"vocab_size": 131, "d_model": 96, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2}
    | {"d_ff": 56, "max_seq_len": 128},
)
PARTS: dict[str, Callable[[ModernDecoderLM], Any]] = {
    "attention": lambda model: model.blocks[0].attention,
    "ffn": lambda model: model.blocks[0].moe or model.blocks[0].ffn,
    "norm": lambda model: model.blocks[0].attention_norm,
    "position": lambda model: model.position,
    "decoder": lambda model: model,
}


def model_of(sizes: dict[str, int], changes: str) -> ModernDecoderLM:
    """A model with the changes of a table's first column, such as ``norm=rmsnorm bias=true``."""
    config: dict[str, Any] = dict(sizes)
    for change in changes.split():
        field, _, value = change.partition("=")
        section, _, option = field.rpartition(".")
        (config.setdefault(section, {}) if section else config)[option] = yaml.safe_load(value)
    return ModernDecoderLM(ModelConfig(**config))


def value_of(formula: str, config: ModelConfig, n_tokens: int) -> float:
    """A formula in the letters of docs/model_architecture.md."""
    letters = {
        **{"V": config.vocab_size, "D": config.d_model, "L": config.n_layers, "F": config.d_ff},
        **{"N": config.n_heads, "K": config.n_kv_heads, "H": config.head_size},
        **{"P": config.max_seq_len, "T": n_tokens, "C": min(64, n_tokens)},
    }
    if config.moe is not None:
        letters |= {"E": config.moe.n_experts, "k": config.moe.top_k}
    assert re.fullmatch(r"[\w\s*+()]+", formula), f"no formula: {formula}"
    return float(eval(formula, {"__builtins__": {}}, letters))


def cached_numbers(model: ModernDecoderLM, n_tokens: int) -> int:
    """Numbers that one layer's cache holds for one row of so many tokens."""
    cache = model.new_cache(1, n_tokens)
    with torch.no_grad():
        model(torch.zeros(1, n_tokens, dtype=torch.long), cache=cache)
    if isinstance(cache, KVCache):
        return (cache.k.numel() + cache.v.numel()) // model.config.n_layers
    assert isinstance(cache, StateCache)
    return sum(x.numel() for x in cache.states[0])


@pytest.mark.parametrize("sizes", SIZES, ids=["small", "other"])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1]}: {row[2]}")
def test_formula_is_the_cost(row: tuple[str, ...], sizes: dict[str, int]) -> None:
    _, part, changes, params, flops, *cached = row
    model, n_tokens = model_of(sizes, changes), sizes["max_seq_len"]
    cost: Cost = PARTS[part](model).cost(n_tokens)
    assert value_of(params, model.config, n_tokens) == cost.params
    assert value_of(flops, model.config, n_tokens) == pytest.approx(cost.flops_per_token_forward)
    for formula in cached:
        assert value_of(formula, model.config, n_tokens) == cached_numbers(model, n_tokens)


def test_every_kind_of_part_has_its_table() -> None:
    assert {row[1] for row in ROWS} == set(PARTS)


@pytest.mark.parametrize(
    ("page", "registry"),
    [(page, registry) for page, registries in PAGES.items() for registry in registries],
    ids=lambda x: x.kind if isinstance(x, Registry) else x,
)
def test_every_component_is_on_its_page(page: str, registry: Registry) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert not [name for name in registry if f"`{name}`" not in text]
