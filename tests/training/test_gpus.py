import pytest

from modern_llm.errors import ConfigError
from modern_llm.training.gpus import ALIASES, GPUS, gpu_named
from modern_llm.training.throughput import GPU_TFLOPS, gpu_peak


@pytest.mark.parametrize(
    ("given", "name", "memory_gb"),
    [
        ("h100", "h100", 80),
        ("H100", "h100", 80),
        ("H200", "h200", 141),
        ("a100-40gb", "a100-40gb", 40),
        ("A100 80GB", "a100-80gb", 80),
        ("b200", "b200", 180),
        ("gh200", "gh200-96gb", 96),
        ("l40s", "l40s", 48),
        ("rtx4090", "rtx4090", 24),
        ("RTX 4090", "rtx4090", 24),
        ("rtx_5090", "rtx5090", 32),
    ],
)
def test_names_as_people_write_them(given: str, name: str, memory_gb: float) -> None:
    found, card = gpu_named(given)
    assert (found, card.memory_gb) == (name, memory_gb)


@pytest.mark.parametrize("name", sorted(GPUS))
def test_every_card_has_a_peak_and_a_source(name: str) -> None:
    card = GPUS[name]
    assert card.source.startswith("https://")
    assert card.peak_flops(card.precision) == gpu_peak(card.device, card.precision).flops
    assert card.peak_flops("fp32") is None
    assert 12 <= card.memory_gb <= 180
    size = [part for part in name.split("-") if part.endswith("gb")]
    assert not size or size == [f"{card.memory_gb:g}gb"]


def test_every_peak_of_the_table_can_be_planned_for() -> None:
    """But those that differ in their connection alone."""
    sources = {source for *_, source in GPU_TFLOPS}
    assert sources == {card.source for card in GPUS.values()}
    assert set(ALIASES.values()) <= set(GPUS)


def test_old_cards_compute_in_fp16() -> None:
    assert [gpu_named(name)[1].precision for name in ("t4", "v100-32gb", "a100-40gb")] == [
        "fp16", "fp16", "bf16",
    ]  # fmt: skip


def test_unknown_and_ambiguous_names() -> None:
    with pytest.raises(ConfigError, match=r"--gpu mi300x: unknown; the table has b200, .*rtx3090"):
        gpu_named("mi300x")
    with pytest.raises(ConfigError, match=r"--gpu a100: which of a100-80gb, a100-40gb\?"):
        gpu_named("a100")
    for name in ("", "h", "-"):
        with pytest.raises(ConfigError):
            gpu_named(name)
