from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.alignment import sampling
from modern_llm.alignment.sampling import continue_text, sample_answers, sample_ids, sample_texts
from modern_llm.alignment.stages.pretrain import PretrainStage
from modern_llm.config import PipelineConfig
from modern_llm.data.templates import Turn, prompt_ids
from modern_llm.data.tokenizer import Tokenizer
from modern_llm.errors import ConfigError
from modern_llm.models import ModernDecoderLM
from modern_llm.runtime.devices import autocast

PROMPTS = [
    "Tom has 3 pens. He buys 4 more. How many pens does Tom have now?",
    "Say hello.",
    "Anna has 12 cups.",
    "How many words are here: red blue",
]


@pytest.fixture
def sharp(policy: ModernDecoderLM) -> ModernDecoderLM:
    """The tiny policy's shape with random weights whose answers differ and may end."""
    torch.manual_seed(5)
    model = ModernDecoderLM(policy.config.model_copy(update={"init_std": 0.3}))
    return model.eval()


def drawn(
    model: ModernDecoderLM, tokenizer: Tokenizer, prompts: Any, **changes: Any
) -> list[list[str]]:
    options = {"max_new_tokens": 8, "n_samples": 3, "temperature": 0.9, "seed": 4, **changes}
    return sample_texts(model, tokenizer, prompts, **options)


def test_an_answer_does_not_depend_on_what_is_sampled_beside_it(
    sharp: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    together = drawn(sharp, tokenizer, PROMPTS)
    assert drawn(sharp, tokenizer, PROMPTS[::-1])[::-1] == together
    assert [drawn(sharp, tokenizer, [prompt])[0] for prompt in PROMPTS] == together
    assert drawn(sharp, tokenizer, PROMPTS * 2) == together * 2


def test_more_samples_begin_with_the_same_ones(
    sharp: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    few, many = (drawn(sharp, tokenizer, PROMPTS, n_samples=n) for n in (2, 5))
    assert [group[:2] for group in many] == few


def test_samples_of_one_prompt_differ_and_follow_the_seed(
    sharp: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    first = drawn(sharp, tokenizer, PROMPTS[:1])
    assert len(set(first[0])) == 3
    assert drawn(sharp, tokenizer, PROMPTS[:1]) == first
    assert drawn(sharp, tokenizer, PROMPTS[:1], seed=5) != first


def test_sampling_does_not_touch_the_global_generator(
    sharp: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    drawn(sharp, tokenizer, PROMPTS[:1])
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_is_the_likeliest_token_after_the_template(
    sharp: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    (answers,) = sample_texts(sharp, tokenizer, [PROMPTS[1]], max_new_tokens=4)
    ids = prompt_ids(tokenizer, PROMPTS[1])
    expected: list[int] = []
    with torch.no_grad():
        for _ in range(4):
            logits = sharp(torch.tensor([ids + expected]))[0, -1, : tokenizer.n_vocab]
            if int(logits.argmax()) == tokenizer.eos_id:
                break
            expected.append(int(logits.argmax()))
    assert answers == [tokenizer.decode(expected)]


def test_a_prompt_without_room_is_cut_from_its_start(
    sharp: ModernDecoderLM, tokenizer: Tokenizer
) -> None:
    long = "red blue " * 200 + "Say hello."
    ids = prompt_ids(tokenizer, long)
    room = sharp.config.max_seq_len - 8
    (answers,) = sample_texts(sharp, tokenizer, [long], max_new_tokens=8)
    (expected,) = sample_ids(sharp, tokenizer, [[*ids[:2], *ids[-(room - 2) :]]], max_new_tokens=8)
    assert answers == [tokenizer.decode(expected)]


@pytest.mark.parametrize("new", [8, 127, 128, 500])
def test_a_text_without_room_is_continued_from_its_end(
    sharp: ModernDecoderLM, tokenizer: Tokenizer, new: int
) -> None:
    text = "red blue " * 200 + "One day"
    room = max(0, sharp.config.max_seq_len - new - 1)
    ids = tokenizer.encode(text)
    start = [tokenizer.bos_id, *ids[len(ids) - room :]]
    (expected,) = sample_ids(
        sharp, tokenizer, [start], max_new_tokens=new, temperature=0.8, seeds=[0]
    )
    done = continue_text(sharp, tokenizer, text, max_new_tokens=new)
    assert done == tokenizer.decode(expected) != ""


def test_a_stage_samples_as_it_trains(
    tiny: PipelineConfig, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tiny.eval.model_copy(update={"completions": ["red blue " * 200]})
    training = tiny.pretrain.training.model_copy(update={"precision": "bf16"})
    section = tiny.pretrain.model_copy(update={"training": training})
    config = tiny.model_copy(update={"eval": tasks, "pretrain": section})
    stage = PretrainStage(config, tmp_path, tiny_run.run / "pretrain" / "final")
    seen: list[str] = []

    def noted(device: Any, precision: str) -> Any:
        seen.append(precision)
        return autocast(device, precision)

    monkeypatch.setattr(sampling, "autocast", noted)
    row = stage.sample(stage.build_model().eval())
    assert row["prompt"] == "red blue " * 200
    assert seen == ["bf16"]


def test_no_room_for_any_prompt_is_an_error(sharp: ModernDecoderLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError):
        sample_texts(sharp, tokenizer, ["Hi"], max_new_tokens=sharp.config.max_seq_len)


def test_a_dialogue_is_a_prompt(sharp: ModernDecoderLM, tokenizer: Tokenizer) -> None:
    turns = [Turn("user", "Hi."), Turn("assistant", "Hello."), Turn("user", "And?")]
    (answers,) = sample_texts(sharp, tokenizer, [turns], max_new_tokens=4)
    (expected,) = sample_ids(sharp, tokenizer, [prompt_ids(tokenizer, turns)], max_new_tokens=4)
    assert answers == [tokenizer.decode(expected)]


def test_ids_beyond_the_tokenizer_are_never_drawn(
    tokenizer: Tokenizer, make_model: Callable[..., ModernDecoderLM]
) -> None:
    model = make_model(vocab_size=tokenizer.n_vocab + 40)
    with torch.no_grad():  # the unused rows are the likeliest
        model.embedding.weight[tokenizer.n_vocab :] *= 50
    rows = sample_ids(
        model, tokenizer, [[tokenizer.bos_id, 9]] * 4, max_new_tokens=12, temperature=2.0,
        seeds=[0, 1, 2, 3],
    )  # fmt: skip
    assert all(token < tokenizer.n_vocab for row in rows for token in row)


def test_answers_tell_what_was_drawn(sharp: ModernDecoderLM, tokenizer: Tokenizer) -> None:
    long = "word " * 300
    options = {"max_new_tokens": 40, "n_samples": 30, "temperature": 0.9, "seed": 4}
    groups = sample_answers(sharp, tokenizer, ["Hi", long], **options)
    texts = sample_texts(sharp, tokenizer, ["Hi", long], **options)
    assert [[tokenizer.decode(a.tokens) for a in group] for group in groups] == texts
    assert groups[0][0].prompt == prompt_ids(tokenizer, "Hi")
    assert len(groups[1][0].prompt) == sharp.config.max_seq_len - 40  # as the model saw it
    flat = [answer for group in groups for answer in group]
    assert all(len(a.tokens) == 40 for a in flat if not a.finished)
    assert any(len(a.tokens) < 40 for a in flat)
    assert all(a.finished for a in flat if len(a.tokens) < 40)
