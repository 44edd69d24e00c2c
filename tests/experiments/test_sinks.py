"""The study of attention sinks: streamed losses against slow ones, statistics, refusals, a run."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modern_llm.cli import main
from modern_llm.config import ModelConfig, PipelineConfig, load_config
from modern_llm.data.tokenizer import Tokenizer, build_tokenizer
from modern_llm.errors import CheckpointError, ConfigError, DataError, ModernLLMError
from modern_llm.experiments import cells
from modern_llm.experiments.sinks.arms import Arm, arms_of, check_model, kind_of, stretched
from modern_llm.experiments.sinks.scores import bin_edges, bin_means, by_context, summary
from modern_llm.experiments.sinks.stream import (
    attention_shares,
    cache_bytes,
    compose,
    position_nats,
)
from modern_llm.experiments.sinks.study import Study, cell_of, run_study
from modern_llm.models import ModernDecoderLM
from modern_llm.models.generate import Sampling
from modern_llm.training.checkpoint import read_checkpoint, write_checkpoint

CONTEXT, WINDOW, SINKS, LENGTH = 8, 5, 2, 40
FULL, WINDOWED = {}, {"attention": "window", "window": WINDOW}


def make(**changes: Any) -> ModernDecoderLM:
    """A model of context 8, stretched to texts of 40, with weights that make attention matter."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=19, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=32)
    config = ModelConfig(**{**sizes, "max_seq_len": CONTEXT, "init_std": 0.3, **changes})
    model = ModernDecoderLM(stretched(config, LENGTH))
    for name, parameter in model.named_parameters():
        if name.endswith("sink_N"):
            parameter.data.normal_()
    return model.eval().requires_grad_(False)


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 19, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(1))


# --- losses, against a slow reference -----------------------------------------------------------


def turned(x_H: torch.Tensor, position: int) -> torch.Tensor:
    half = x_H.shape[0] // 2
    angle = position * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x_H[:half], x_H[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()])


def slow_nats(model: ModernDecoderLM, text: list[int], arm: Arm) -> torch.Tensor:
    """Losses in float64 without any cache: every position by the set of keys that it may see.

    The position of a key is its index in that set, that of the query the last one.
    """
    c = model.config
    size = c.d_model // c.n_heads
    x = model.embedding.weight.double()[torch.tensor(text[:-1])]
    for block in model.blocks:
        attention = block.attention
        weight = attention.qkv.weight.double()
        heads = (norm(x, block.attention_norm.weight) @ weight.T).view(len(x), -1, size)
        mixed = []
        for t in range(len(x)):
            if arm.capacity is None:
                seen = list(range(t + 1))
            else:
                recent = range(max(arm.n_sinks, t + 1 - (arm.capacity - arm.n_sinks)), t + 1)
                seen = [*range(min(arm.n_sinks, t + 1)), *recent]
            row = []
            for n in range(c.n_heads):
                g = n // (c.n_heads // c.n_kv_heads)
                query = turned(heads[t, n], len(seen) - 1)
                keys = [turned(heads[s, c.n_heads + g], i) for i, s in enumerate(seen)]
                logits = torch.stack([query @ key for key in keys]) / math.sqrt(size)
                below = logits.exp().sum()
                if attention.sink_N is not None:
                    below = below + attention.sink_N[n].double().exp()
                values = heads[seen, c.n_heads + c.n_kv_heads + g]
                row.append((logits.exp() / below) @ values)
            mixed.append(torch.cat(row))
        x = x + torch.stack(mixed) @ attention.out.weight.double().T
        inner = norm(x, block.ffn_norm.weight).float()  # the feed-forward knows no position
        x = x + block.ffn(inner).double()
    logits = norm(x, model.final_norm.weight) @ model.embedding.weight.double().T
    return -logits.log_softmax(-1)[torch.arange(len(x)), torch.tensor(text[1:])]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


ARMS = {
    "all keys, positions beyond the context": (FULL, 0),
    "last keys of a model with full attention": (FULL, 1),
    "sinks and last keys": (FULL, 2),
    "trained with a window": (WINDOWED, 0),
    "window and learned sinks": ({**WINDOWED, "sink": "learned"}, 0),
    "window and streaming sinks": ({**WINDOWED, "window": 3, "n_sinks": 2}, 0),
}


@pytest.mark.parametrize("what", ARMS)
def test_streamed_losses_equal_those_of_explicit_keys_and_positions(what: str) -> None:
    changes, index = ARMS[what]
    model = make(**changes)
    arm = arms_of(model.config, window=changes.get("window", WINDOW), n_sinks=SINKS)[index]
    texts = tokens()
    actual = position_nats(model, texts, arm.new_cache(model, 2, LENGTH))
    expected = torch.stack([slow_nats(model, row, arm) for row in texts.tolist()])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_window_needs_no_positions_of_its_own() -> None:
    """Indices into the cache and positions in the text give a windowed model the same losses."""
    model = make(**WINDOWED)
    (arm,) = arms_of(model.config, window=WINDOW, n_sinks=SINKS)
    texts = tokens()
    streamed = position_nats(model, texts, arm.new_cache(model, 2, LENGTH))
    logits = model(texts[:, :-1]).double()
    at_once = -logits.log_softmax(-1).gather(2, texts[:, 1:, None])[..., 0]
    torch.testing.assert_close(streamed, at_once, rtol=1e-4, atol=1e-4)


def test_arms_differ_only_after_something_was_dropped() -> None:
    model, texts = make(), tokens()
    by_arm = [
        position_nats(model, texts, arm.new_cache(model, 2, LENGTH))
        for arm in arms_of(model.config, window=WINDOW, n_sinks=SINKS)
    ]
    for other in by_arm[1:]:
        torch.testing.assert_close(by_arm[0][:, :WINDOW], other[:, :WINDOW], rtol=1e-5, atol=1e-5)
        assert (by_arm[0][:, WINDOW:] - other[:, WINDOW:]).abs().mean() > 0.01
    assert (by_arm[1] - by_arm[2]).abs().max() > 0.01


def sinking() -> ModernDecoderLM:
    """A model by hand that rests its attention on token 0, whose value is nothing.

    It says the last token again. Without token 0 in view it adds up the values of the others, all
    of which speak for token 18.
    """
    model = make(n_layers=1, n_heads=1, n_kv_heads=1, position="none")
    block = model.blocks[0]
    for parameter in (model.embedding.weight, block.attention.qkv.weight, *block.ffn.parameters()):
        parameter.zero_()
    model.final_norm.weight.fill_(1.0)
    w_q, w_k, w_v = block.attention.qkv.weight.chunk(3)
    model.embedding.weight[:, :19] = 4 * torch.eye(19)
    w_q[0, :19] = 1.0  # every token asks, token 0 alone answers
    w_k[0, 0] = 8.0
    w_v[18, 1:18] = 1.0
    block.attention.out.weight.copy_(3 * torch.eye(32))
    return model


def test_a_model_that_rests_on_its_first_token_breaks_when_that_is_dropped() -> None:
    model = sinking()
    said = torch.randint(1, 18, (6, 1), generator=torch.Generator().manual_seed(2))
    texts = torch.cat([torch.zeros(6, 1, dtype=torch.long), said.expand(6, LENGTH)], 1)
    assert attention_shares(model, texts[:, :CONTEXT], n_first=1)["first"] > 0.99
    edges = bin_edges(CONTEXT, LENGTH // CONTEXT)
    found = {}
    for arm in arms_of(model.config, window=WINDOW, n_sinks=1):
        nats = position_nats(model, texts, arm.new_cache(model, 6, LENGTH)).numpy()
        means = bin_means(nats, edges)[None]
        found[arm.keeps] = summary(means, means, edges, context=CONTEXT, window=WINDOW)
    assert found["recent"]["breaks_at"] == WINDOW / CONTEXT
    assert found["recent"]["contexts"][-1]["value"] > 10
    for whole in ("all", "sinks"):
        assert found[whole]["breaks_at"] is None
        assert found[whole]["contexts"][-1]["value"] < 0.01


def test_shares_of_attention_are_those_of_the_softmax() -> None:
    model = make(n_layers=1, sink="learned", n_kv_heads=4)
    texts, block = tokens()[:, :CONTEXT], model.blocks[0]
    kernel = block.attention.kernel
    shares = attention_shares(model, texts, n_first=2)
    assert block.attention.kernel is kernel, "the kernel is put back"
    first, learned = [], []
    for row in texts:
        x = norm(model.embedding.weight[row].double(), block.attention_norm.weight)
        heads = (x @ block.attention.qkv.weight.double().T).view(CONTEXT, 3, 4, 8)
        for n, t in [(n, t) for n in range(4) for t in range(CONTEXT // 2, CONTEXT)]:
            query = turned(heads[t, 0, n], t)
            keys = [turned(heads[s, 1, n], s) for s in range(t + 1)]
            logits = torch.stack([query @ key for key in keys]) / math.sqrt(8)
            sink = block.attention.sink_N[n : n + 1].double()
            weights = torch.cat([logits, sink]).softmax(0)
            first.append(weights[:2].sum().item())
            learned.append(weights[-1].item())
    assert shares["first"] == pytest.approx(np.mean(first), abs=1e-5)
    assert shares["learned"] == pytest.approx(np.mean(learned), abs=1e-5)
    assert shares["even"] == pytest.approx(2 * np.mean([1 / 5, 1 / 6, 1 / 7, 1 / 8]))
    assert attention_shares(make(**WINDOWED), texts, n_first=2)["first"] is None


# --- memory and writing -------------------------------------------------------------------------


def test_bytes_are_those_of_the_tensors() -> None:
    for changes, index in ARMS.values():
        model = make(**changes)
        arm = arms_of(model.config, window=changes.get("window", WINDOW), n_sinks=SINKS)[index]
        cache = arm.new_cache(model, 1, LENGTH)
        position_nats(model, tokens(1), cache)
        held = [cache.k, cache.v]
        tensors = (
            held if isinstance(cache.k, torch.Tensor) else [x for d in held for x in d.values()]
        )
        assert cache_bytes(model, cache.length) == sum(x.nbytes for x in tensors)
        assert cache.length == (LENGTH if arm.capacity is None else arm.capacity)


def test_written_text_is_what_the_losses_call_likely() -> None:
    """Greedy tokens are the likeliest by an own reading of the same text through the same cache."""
    model = make()
    for arm in arms_of(model.config, window=WINDOW, n_sinks=SINKS):
        written, seconds = compose(
            model, [3, 4, 5], LENGTH - 3, arm.new_cache(model, 1, LENGTH),
            sampling=Sampling(), seed=0,
        )  # fmt: skip
        text = [3, 4, 5, *written]
        assert len(seconds) == len(written) == LENGTH - 3
        for other in range(0, 19, 6):
            changed = [*text[:-1], other]
            nats = [slow_nats(model, row, arm)[-1] for row in (text, changed)]
            assert nats[0] <= nats[1] + 1e-6


# --- statistics ---------------------------------------------------------------------------------


def test_bins_and_contexts_are_means_over_positions() -> None:
    edges = bin_edges(12, 3)
    assert edges[0] == 0 and edges[-1] == 36 and len(edges) == 25 and edges[8] == 12
    nats = np.random.default_rng(0).normal(size=(4, 36))
    means = bin_means(nats, edges)
    for k in range(24):
        np.testing.assert_allclose(means[:, k], nats[:, edges[k] : edges[k + 1]].mean(1))
    contexts = by_context(means[None], edges, 12)
    np.testing.assert_allclose(contexts[0], nats.reshape(4, 3, 12).mean(2))
    assert bin_edges(4, 2) == list(range(9))


def test_a_break_is_where_the_loss_is_surely_higher() -> None:
    rng = np.random.default_rng(0)
    edges = bin_edges(16, 4)
    means = 2 + 0.05 * rng.normal(size=(1, 50, 32))
    still = summary(means, means, edges, context=16, window=8)
    assert still["breaks_at"] is None and still["settled"] == pytest.approx(2, abs=0.02)
    means[:, :, 12:] += 0.3
    broken = summary(means, means, edges, context=16, window=8)
    assert broken["breaks_at"] == 1.5
    assert all(row["value"] == 0 for row in broken["against"])
    low, high = broken["contexts"][-1]["ci95"]
    assert low < 2.3 < high and high - low < 0.02
    noisy = means + 3 * rng.normal(size=means.shape)
    assert summary(noisy, means, edges, context=16, window=8)["breaks_at"] is None


# --- what is refused ----------------------------------------------------------------------------


YARN = {"name": "rope", "scaling": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"position": "learned"}, "'learned' ends at the context of 8 tokens"),
        ({"position": "sinusoidal"}, "'sinusoidal' ends at the context"),
        ({"position": YARN, "max_seq_len": 512}, "rope (without yarn)"),
        ({"attention": "linear"}, "has no softmax"),
        ({**WINDOWED, "window_pattern": "SL"}, "layers without a window keep all keys"),
        ({**WINDOWED, "window": 4}, "its window is 4, that of the study 5"),
        ({"max_seq_len": 5}, "a window of 5 tokens hides nothing in a context of 5"),
    ],
)
def test_models_that_cannot_be_read_so_far_are_refused(changes: Any, told: str) -> None:
    sizes = dict(vocab_size=19, d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT)
    config = ModelConfig(**{**sizes, **changes})
    with pytest.raises(ConfigError) as caught:
        check_model(config, "it", window=WINDOW, n_tokens=4096)
    assert told in str(caught.value) and str(caught.value).startswith("it: ")


@pytest.mark.parametrize("position", ["rope", "none", "alibi", {"name": "rope", "theta": 500.0}])
def test_relative_positions_reach_on(position: Any) -> None:
    sizes = dict(vocab_size=19, d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT)
    check_model(ModelConfig(**sizes, position=position), "it", window=5, n_tokens=LENGTH)


def test_kinds_are_told_apart() -> None:
    sizes = dict(vocab_size=19, d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT)
    kinds = {
        kind_of(ModelConfig(**sizes, **changes))
        for changes, _ in [*ARMS.values(), ({"sink": "learned"}, 0)]
    }
    assert len(kinds) == 5
    labels = [
        arm.label
        for changes, _ in ARMS.values()
        for arm in arms_of(ModelConfig(**sizes, **changes), window=WINDOW, n_sinks=SINKS)
    ]
    assert len(set(labels)) == 6
    assert "trained with full attention; cache: first 2 + last 3" in labels


# --- a whole study ------------------------------------------------------------------------------

TINY = {
    **{"model.attention": "window", "model.window": 8, "model.max_seq_len": 16},
    **{"dpo.max_prompt_tokens": 8, "dpo.max_answer_tokens": 4, "pretrain.training.max_steps": 2},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Path]) -> Study:
    """A study of three tiny models, run once."""
    folder = tmp_path_factory.mktemp("sinks")
    config = load_config(write_tiny(folder, TINY))
    study = Study(config, contexts=3, n_sinks=2, n_texts=6)
    written = run_study(study)
    assert written == (study.folder / "result.json", folder / "report" / "tiny_report.md")
    return study


def finals(study: Study) -> list[Path]:
    return sorted(study.folder.glob("runs/*/pretrain/final"))


def test_the_result_has_every_arm(study: Study) -> None:
    result = json.loads((study.folder / "result.json").read_text())
    assert [arm["name"] for arm in result["arms"]] == [
        "full/all", "full/recent", "full/sinks", "window/recent", "window-learned/recent",
    ]  # fmt: skip
    for arm in result["arms"]:
        assert len(arm["bins"]) == len(arm["against"]) == 24 and len(arm["contexts"]) == 3
        assert all(low <= high for row in arm["bins"] for low, high in [row["ci95"]])
        assert arm["contexts"][0]["value"] == pytest.approx(
            np.mean([row["value"] for row in arm["bins"][:8]])
        )
        assert arm["cache_tokens"] == (48 if arm["name"] == "full/all" else 8)
        assert arm["seconds_per_token"]["last"] > 0
        assert arm["sample"]["tokens"] == 48 - 8
    assert {(d["arm"], d["minus"]) for d in result["differences"]} >= {
        ("full/recent", "full/sinks")
    }
    assert "6 texts" in result["interval"] and "seed" not in result["interval"]
    assert [model["seed"] for model in result["models"]] == [0, 0, 0]


def test_only_the_attention_differs_between_the_models(study: Study) -> None:
    full, window, learned = (
        cell_of(study, kind, 0, text="").config for kind in ("full", "window", "window-learned")
    )
    assert full.model.window is None and window.model.window == 8
    assert learned.model.sink == "learned" and window.model.sink == "none"
    for cell in (window, learned):
        same = {"attention", "window", "sink"}
        assert cell.model.model_dump(exclude=same) == full.model.model_dump(exclude=same)
        assert cell.pretrain == full.pretrain
    other = cell_of(study, "full", 7, text="")
    assert other.config.pretrain.training.seed == 7
    assert other.name != cell_of(study, "full", 0, text="").name


def test_the_same_study_again_changes_no_file(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in study.folder.parent.parent.rglob("*.[jm][sd]*")}

    before = state()
    monkeypatch.setattr(cells, "subprocess", None)  # nothing is trained again
    assert run_study(study) == (
        study.folder / "result.json",
        study.config.paths.report / "tiny_report.md",
    )
    assert state() == before


def test_what_was_measured_is_not_measured_again(
    study: Study, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A study that lost its result, and one arm, measures that arm alone."""
    home = tmp_path / "runs" / "tiny"
    shutil.copytree(study.folder, home)
    (home / "result.json").unlink()
    next((home / "arms").glob("full-sinks-*")).unlink()
    measured = []
    real = run_study.__globals__["measure"]

    def noted(model: Any, arm: Arm, *args: Any, **more: Any) -> Any:
        measured.append(arm.name)
        return real(model, arm, *args, **more)

    monkeypatch.setitem(run_study.__globals__, "measure", noted)
    assert run_study(elsewhere(study, tmp_path)) is not None
    assert measured == ["full/sinks"]


def copied(final: Path, target: Path, *, tokenizer: Tokenizer | None = None) -> Path:
    """The checkpoint with other weights, and another tokenizer where one is given."""
    found = read_checkpoint(final)
    weights = {name: x * 1.05 for name, x in found.weights.items()}
    meta = {k: v for k, v in found.meta.items() if k != "tokenizer_sha256"}
    text = tokenizer.to_json() if tokenizer else found.tokenizer_path.read_text()
    write_checkpoint(target, weights=weights, meta=meta, tokenizer_json=text, trainer_state=None)
    return target


def elsewhere(study: Study, folder: Path, **changes: Any) -> Study:
    """The same study with its results below ``folder``."""
    paths = {"output": folder / "runs", "report": folder / "report"}
    moved = study.config.paths.model_copy(update=paths)
    return replace(study, config=study.config.model_copy(update={"paths": moved}), **changes)


def test_checkpoints_of_one_kind_are_its_seeds(study: Study, tmp_path: Path) -> None:
    first = finals(study)[0]
    given = elsewhere(study, tmp_path, checkpoints=(first, copied(first, tmp_path / "second")))
    read = json.loads(run_study(given)[0].read_text())
    assert read["n_seeds"] == 2 and "2 seeds" in read["interval"]
    assert [arm["name"] for arm in read["arms"]] == ["full/all", "full/recent", "full/sinks"]
    assert not list((tmp_path / "runs").glob("**/pretrain")), "nothing is trained"
    own = json.loads((study.folder / "result.json").read_text())
    (mine,) = [arm for arm in own["arms"] if arm["name"] == "full/sinks"]
    assert read["arms"][2]["contexts"][0]["value"] != mine["contexts"][0]["value"]


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"contexts": 1}, ConfigError, "--contexts 1: at least 2"),
        ({"n_sinks": 8}, ConfigError, "--n-sinks 8: from 1 to 7"),
        ({"seeds": ()}, ConfigError, "--seeds 0"),
        ({"contexts": 900}, DataError, "held-out tokens are too few for two texts of 900 contexts"),
    ],
)
def test_numbers_that_do_not_fit_are_told_before_training(
    study: Study, changes: Any, error: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "subprocess", None)
    with pytest.raises(error) as caught:
        run_study(replace(study, **changes))
    assert told in str(caught.value)


def test_checkpoints_that_do_not_compare_are_refused(
    study: Study, tiny_run: Any, tmp_path: Path
) -> None:
    full, _, window = finals(study)
    texts = ["some other text"]
    own = build_tokenizer(
        study.config.tokenizer, vocab_size=512, texts=lambda: iter(texts),
        data=study.config.data.model_copy(update={"cache_dir": tmp_path}),
    )  # fmt: skip
    other = copied(window, tmp_path / "other", tokenizer=own)
    longer = tiny_run.run / "pretrain" / "final"
    for others, error, told in (
        ((full,), CheckpointError, "are the same checkpoint; name it once"),
        ((other,), CheckpointError, "have different tokenizers"),
        ((longer, window), ConfigError, "as many each: 2 of full, 1 of window"),
        ((longer,), CheckpointError, "have contexts of 128 and 16 tokens"),
    ):
        with pytest.raises(error) as caught:
            run_study(replace(study, checkpoints=(full, *others)))
        assert told in str(caught.value)


def test_the_command_tells_one_message_and_its_code(
    study: Study, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def told(*arguments: object) -> tuple[int, str]:
        code = main(["experiment-sinks", "--output-dir", str(tmp_path), *map(str, arguments)])
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, err

    code, err = told("model.position=learned")
    assert code == 2 and "'learned' ends at the context of 128 tokens" in err
    code, err = told("model.window=128")
    assert code == 2 and "hides nothing" in err
    code, err = told("--seeds", 2, "--checkpoints", finals(study)[0])
    assert code == 2 and "--seeds has no effect" in err
    code, err = told("--contexts", 5000)
    assert code == 3 and "too few for two texts of 5000 contexts" in err
    code, err = told("--checkpoints", tmp_path / "none")
    assert code == 4
    assert not list(tmp_path.rglob("result.json"))


def test_no_overwrite_leaves_a_result_alone(study: Study, capsys: Any) -> None:
    assert run_study(replace(study, on_exists="skip")) is None


def test_a_model_that_cannot_be_trained_is_told(study: Study, tmp_path: Path) -> None:
    tight = study.config.model_dump(mode="json")
    tight["pretrain"]["training"]["optimizer"] = {"name": "adamw", "fused": "no"}
    tight["paths"]["output"] = str(tmp_path)
    broken = replace(study, config=PipelineConfig.model_validate(tight))
    with pytest.raises(ModernLLMError, match=r"could be trained\nfull-seed0-\w+: exit code 2"):
        run_study(broken)


def test_the_script_reads_checkpoints(study: Study, cli: Any, tmp_path: Path) -> None:
    """The command as a user gives it, overrides behind the checkpoints."""
    source = json.dumps([study.config.model_dump(mode="json")["pretrain"]["data"][0]])
    done = cli(
        "scripts/experiment_attention_sinks.py", "--output-dir", tmp_path, "--contexts", 2,
        "--n-sinks", 1, "--checkpoints", *finals(study), "model.window=8",
        f"pretrain.data={source}",
        f"data.cache_dir={study.config.data.cache_dir}", "eval.device=cpu", "eval.threads=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 'report' / 'sinks-demo_report.md'}" in done.stdout
    result = json.loads((tmp_path / "sinks-demo" / "result.json").read_text())
    assert len(result["arms"]) == 5 and result["n_sinks"] == 1
    assert result["command"].startswith("modern-llm experiment-sinks")
    assert result["arms"][2]["label"].endswith("first 1 + last 7")
