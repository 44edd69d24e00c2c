"""What the ranks of the tests run; `rank_server` calls these functions in forked processes."""

import importlib
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modern_llm import cli
from modern_llm.alignment.pipeline import concrete
from modern_llm.alignment.stages import STAGES
from modern_llm.config import ModelConfig, PipelineConfig, TrainingConfig, load_config
from modern_llm.data.collate import TokenBatch
from modern_llm.errors import DataError, StoppedBySignal
from modern_llm.models import ModernDecoderLM, VerifierModel
from modern_llm.models.weights import whole
from modern_llm.runtime.ranks import group, joined, launched_ranks
from modern_llm.runtime.seeding import seed_everything
from modern_llm.training.engines import ENGINES, Engine
from modern_llm.training.objectives import LMObjective
from modern_llm.training.trainer import Trainer
from modern_llm.training.update import Update


def command(
    arguments: list[str], faults: Sequence[dict[str, Any]] = (), watch: str | None = None
) -> int:
    """One command line, with faults; see `plant`.

    Args:
        watch: prefix of files to which each rank writes the names of all that it changes.
    """
    for fault in faults:
        plant(**fault)
    changed: list[str] = []
    if watch is not None:
        sys.addaudithook(lambda event, args: changed.extend(written(event, args)))
    code = cli.main(arguments)
    if watch is not None:
        Path(watch + os.environ["RANK"]).write_text("\n".join(changed))
    return code


def written(event: str, args: Any) -> list[str]:
    """Names that an audited event of Python makes or changes."""
    if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return [str(args[0])]
    return [str(args[0])] if event in ("os.mkdir", "os.rename", "os.link", "os.remove") else []


def plant(
    at: str,
    do: str,
    *,
    rank: int | None = None,
    nth: int = 1,
    after: bool = False,
    once: str | None = None,
) -> None:
    """Do something to this process at the ``nth`` call of a function, or after it.

    Args:
        at: the function, ``module:name`` or ``module:Class.name`` below ``modern_llm``.
        do: one of `ACTS`, or the name of a signal to this process.
        rank: of the process; default: all of them.
        nth: call; 0: each of them.
        after: when it returns.
        once: file that says that it was done, in whatever process.
    """
    if rank is not None and rank != int(os.environ.get("RANK", "0")):
        return
    if once is not None and Path(once).exists():
        return
    module, _, path = at.partition(":")
    owner: Any = importlib.import_module(f"modern_llm.{module}")
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    call, calls = getattr(owner, name), itertools.count(1)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        due = nth in (0, next(calls))
        if due and once is not None:
            Path(once).touch()
        if due and not after and do != "break loss":
            act(do, *args)
        result = call(*args, **kwargs)
        if due and do == "break loss":
            return replace(result, loss_sum=result.loss_sum * math.nan)
        if due and after:
            act(do, *args)
        return result

    setattr(owner, name, faulty)


def act(do: str, *args: Any) -> None:
    if do in ACTS:
        ACTS[do](*args)
    else:
        os.kill(os.getpid(), signal.Signals[do])


def fail(*args: Any) -> None:
    raise ValueError("a bug of this rank alone")


def fail_of_data(*args: Any) -> None:
    raise DataError("the data is not what it was")


def fail_to_connect(*args: Any) -> None:
    raise ConnectionRefusedError("Connection refused")


def hang(*args: Any) -> None:
    time.sleep(1000)


def take_long(*args: Any) -> None:
    time.sleep(1.2 * group().timeout_s)


def pause(*args: Any) -> None:
    time.sleep(random.Random(os.urandom(8)).uniform(0.0, 0.03))


def fill_disk(target: Path, *args: Any) -> None:
    """That of a checkpoint, up to a few bytes."""
    with (target.parents[3] / "ballast").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def wait_for_release(target: Path, *args: Any) -> None:
    """Block until the test makes the file ``release`` beside the checkpoints."""
    (target.parents[1] / "blocked").touch()
    while not (target.parents[1] / "release").exists():
        time.sleep(0.005)


@torch.no_grad()
def break_weight(trainer: Trainer, *args: Any) -> None:
    """Of this rank's weights, or its part of them."""
    part = next(p for p in trainer.model.parameters() if p.ndim == 2)
    getattr(part, "_local_tensor", part)[0, 0] = math.nan


ACTS: dict[str, Callable[..., None]] = {
    "fail": fail,
    "data": fail_of_data,
    "no connection": fail_to_connect,
    "hang": hang,
    "pause": pause,
    "take long": take_long,
    "fill disk": fill_disk,
    "block": wait_for_release,
    "break weight": break_weight,
}


def configured(config: str, overrides: list[str]) -> PipelineConfig:
    return concrete(load_config(config, overrides))


def train(config: str, cases: list[dict[str, Any]]) -> None:
    """Train stages one after the other, without scoring them; see `train_case`."""
    with joined(launched_ranks(), timeout_s=60.0):
        for case in cases:
            train_case(config, **case)


def train_case(
    config: str,
    *,
    stage: str,
    run: str,
    parent: str | None = None,
    overrides: list[str],
    stops: list[int] | None = None,
    ends: bool = True,
) -> None:
    """Train one stage, from a parent's checkpoint, stopped by a signal after some steps.

    The random state before each start is another one: what is needed of it must be restored.

    Args:
        ends: whether it is started again after the last stop.
    """
    given = configured(config, overrides)
    for start, stop in enumerate([*(stops or ()), *([None] if ends else [])]):
        seed_everything(1000 * start + group().ranks.rank)
        made = STAGES[stage](given, Path(run), parent and Path(parent))
        try:
            with stopped_after(stop):
                made.train()
        except StoppedBySignal:
            assert stop is not None
        else:
            assert stop is None


class stopped_after:  # noqa: N801 - read as a phrase
    """The last rank sends itself SIGUSR1 inside a step."""

    def __init__(self, stop: int | None) -> None:
        self.stop, self.step = stop, Trainer.train_step

    def __enter__(self) -> None:
        train_step, stop, last = self.step, self.stop, group().world_size - 1

        def signalled(self: Trainer, batches: Any) -> Any:
            if self.progress.step + 1 == stop and group().ranks.rank == last:
                os.kill(os.getpid(), signal.SIGUSR1)
            return train_step(self, batches)

        Trainer.train_step = signalled  # type: ignore[method-assign]

    def __exit__(self, *told: object) -> None:
        Trainer.train_step = self.step  # type: ignore[method-assign]


MADE = {"decoder": ModernDecoderLM, "verifier": VerifierModel}


def build(kind: str, options: dict[str, Any], engine: Engine) -> Any:
    """A model as a stage has it built."""
    torch.manual_seed(5)
    return engine.build(lambda: MADE[kind](ModelConfig(**options)), lambda m: m.initialize_again())


def initial(models: dict[str, dict[str, Any]], folder: str) -> None:
    """Write the first weights of models that are made in parts."""
    with joined(launched_ranks(), timeout_s=60.0):
        for kind, (name, options) in itertools.product(MADE, models.items()):
            engine = ENGINES["fsdp"](torch.device("cpu"), "fp32")
            weights = engine.weights(build(kind, options, engine), copy=True)
            if group().leads:
                save_file(weights, Path(folder) / f"{kind}-{name}.safetensors")
            else:
                assert not weights


class Allocated(TorchDispatchMode):
    """Bytes of all storages that are made inside, the most of them at any time; meta has none."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is torch.Tensor and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.live.setdefault(StorageWeakRef(storage), storage.nbytes())
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def memory(model: dict[str, Any], folder: str) -> None:
    """Write what share of the model's bytes each rank holds at most; see `Allocated`."""
    with joined(launched_ranks(), timeout_s=60.0):
        parameters = list(ModernDecoderLM(ModelConfig(**model)).parameters())
        total = sum(p.numel() * p.element_size() for p in parameters)
        engine = ENGINES["fsdp"](torch.device("cpu"), "fp32")
        with Allocated() as built:
            made = build("decoder", model, engine)
        part = sum(p.to_local().untyped_storage().nbytes() for p in made.parameters())
        with Allocated() as gathered:
            weights = engine.weights(made, copy=True)
        shares = {"built": built.peak, "part": part, "gathered": gathered.peak}
        del weights
        text = json.dumps({name: value / total for name, value in shares.items()})
        (Path(folder) / f"{group().ranks.rank}.json").write_text(text)


def accumulate(
    model: dict[str, Any], engine: str, units: list[int], micro: int, folder: str
) -> None:
    """One update on rows of which so many tokens are supervised; write its gradient."""
    from test_engines import step_rows

    with joined(launched_ranks(), timeout_s=60.0):
        made = ENGINES[engine](torch.device("cpu"), "fp32")
        decoder = build("decoder", model, made)
        config = TrainingConfig(
            max_steps=1, batch_size=len(units), micro_batch_size=micro, seq_len=16,
            max_grad_norm=1e9, distributed={"name": engine},
        )  # fmt: skip
        update = Update(decoder, LMObjective(), config, device=torch.device("cpu"), engine=made)
        tokens_BT, labels_BT = step_rows(units)
        own = slice(group().ranks.rank, None, group().world_size)
        pairs = zip(tokens_BT[own].split(micro), labels_BT[own].split(micro), strict=True)
        gradients = {}
        step = update.optimizers.step

        def kept(*args: Any) -> None:
            gradients.update({n: whole(p.grad).clone() for n, p in decoder.named_parameters()})
            step(*args)

        update.optimizers.step = kept  # type: ignore[method-assign]
        stats = update([TokenBatch(x, y) for x, y in pairs], step=0)
        if group().leads:
            save_file(gradients, Path(folder) / "gradients.safetensors")
            told = {"loss": stats.loss, "grad_norm": stats.grad_norm, "units": stats.units}
            (Path(folder) / "stats.json").write_text(json.dumps(told))


if __name__ == "__main__":  # of torchrun, which starts a file
    sys.exit(command(**json.loads(sys.argv[1])))
