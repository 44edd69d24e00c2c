from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment.preferences import pair_logprobs
from modern_llm.alignment.reference import reference_logprobs
from modern_llm.data.collate import collate_pairs
from modern_llm.data.store import TokenStore
from modern_llm.models import ModernDecoderLM

SEGMENTS = ("prompt", "chosen", "rejected")
Models = Callable[..., ModernDecoderLM]


class Cache:
    """Asks for the reference values and counts how often the model is made for it."""

    def __init__(self, folder: Path, model: ModernDecoderLM) -> None:
        self.folder, self.model, self.made = folder, model, 0

    def __call__(self, store: TokenStore, **changes: Any) -> torch.Tensor:
        def make() -> ModernDecoderLM:
            self.made += 1
            return self.model

        options = {"model_sha256": "a" * 64, "batch_size": 3, "precision": "fp32", **changes}
        return reference_logprobs(make, pair_logprobs, store, cache_dir=self.folder, **options)

    def files(self) -> list[Path]:
        return sorted((self.folder / "reference").iterdir())


@pytest.fixture
def cache(tmp_path: Path, make_model: Models) -> Cache:
    return Cache(tmp_path, make_model())


def test_values_are_those_of_the_model_in_store_order(
    cache: Cache, pair_records: TokenStore
) -> None:
    values = cache(pair_records)
    with torch.no_grad():
        expected = pair_logprobs(cache.model, collate_pairs(pair_records, range(8)))
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-5)
    assert values.dtype == torch.float32 and values.shape == (8, 2)


def test_unchanged_model_and_data_need_no_model(cache: Cache, pair_records: TokenStore) -> None:
    first, second = cache(pair_records), cache(pair_records)
    assert cache.made == 1
    assert torch.equal(first, second)


def test_batch_size_is_no_part_of_the_key(cache: Cache, pair_records: TokenStore) -> None:
    cache(pair_records)
    cache(pair_records, batch_size=8)
    assert cache.made == 1


@pytest.mark.parametrize("change", [{"model_sha256": "b" * 64}, {"precision": "bf16"}])
def test_another_model_is_computed_anew(
    cache: Cache, pair_records: TokenStore, change: dict[str, str]
) -> None:
    cache(pair_records)
    cache(pair_records, **change)
    assert cache.made == 2
    assert len(cache.files()) == 2
    cache(pair_records)  # the first one's values still stand
    assert cache.made == 2


def test_other_data_is_computed_anew(
    cache: Cache, pair_records: TokenStore, make_store: Callable[..., TokenStore], pairs: Any
) -> None:
    before = cache(pair_records)
    prompt, chosen, rejected = pairs[0]
    changed = make_store([(prompt, chosen, [*rejected[:-1], 22]), *pairs[1:]], SEGMENTS)
    after = cache(changed)
    assert cache.made == 2
    assert before[0, 1] != after[0, 1]
    torch.testing.assert_close(before[1:], after[1:], rtol=1e-6, atol=1e-5)


def test_a_changed_model_under_the_same_hash_does_not_move_the_reference(
    cache: Cache, pair_records: TokenStore
) -> None:
    before = cache(pair_records)
    with torch.no_grad():  # what training does to the policy
        for parameter in cache.model.parameters():
            parameter.add_(0.5)
    assert torch.equal(cache(pair_records), before)


@pytest.mark.parametrize("fault", ["cut", "flipped", "empty", "other shape"])
def test_a_damaged_cache_is_computed_again(
    cache: Cache, pair_records: TokenStore, make_store: Callable[..., TokenStore], fault: str,
    pairs: Any,
) -> None:  # fmt: skip
    before = cache(pair_records)
    (path,) = cache.files()
    content = path.read_bytes()
    if fault == "other shape":
        cache(make_store(pairs[:5], SEGMENTS), model_sha256="c" * 64)
        content = next(p for p in cache.files() if p != path).read_bytes()
    elif fault == "cut":
        content = content[: len(content) // 2]
    elif fault == "flipped":
        at = content.index(before.numpy().tobytes()) + 5
        content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    else:
        content = b""
    made = cache.made
    path.write_bytes(content)
    assert torch.equal(cache(pair_records), before)
    assert cache.made == made + 1
    assert torch.equal(cache(pair_records), before)
    assert cache.made == made + 1  # and it is whole again


def test_no_gradient_and_no_dropout(
    cache: Cache, pair_records: TokenStore, make_model: Models
) -> None:
    values = cache(pair_records)
    assert not values.requires_grad
    loss = (values * torch.ones(8, 2, requires_grad=True)).sum()
    loss.backward()  # an inference tensor would be refused here
