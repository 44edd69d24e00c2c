"""How a model, its gradients and its optimizer state lie on the ranks: torch's own engines.

Every engine computes the same training: the same rows, one mean over all units of a step, one
norm of the whole gradient. They differ in what each rank holds (see ``docs/scaling.md``).
"""

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from modern_llm.errors import ConfigError
from modern_llm.models.initialize import without_memory
from modern_llm.models.weights import model_weights, placed, whole
from modern_llm.registry import Registry
from modern_llm.runtime.devices import DTYPES
from modern_llm.runtime.ranks import group, launched_ranks
from modern_llm.training.optim import Optimizers


class Engine(ABC):
    """Base of all engines.

    Args:
        device: of this rank.
        precision: of matrix products: ``fp32``, ``bf16`` or ``fp16``.
    """

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision

    def build(self, make: Callable[[], nn.Module], fill: Callable[[nn.Module], None]) -> nn.Module:
        """The model that is trained, on this rank's device, not wrapped yet.

        Args:
            make: the model with its first weights, on the CPU.
            fill: the same weights, into a model of which each rank has a part.
        """
        return make().to(self.device)

    @abstractmethod
    def wrap(self, model: nn.Module) -> nn.Module:
        """What an objective calls in place of ``model``.

        Raises:
            ConfigError: the engine could not be applied.
        """

    def optimizers(self, built: Optimizers) -> Optimizers:
        """The optimizers as this engine runs them."""
        return built

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Around the forward and backward of every micro-batch of a step but the last."""
        return nullcontext()

    def generating(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Around what calls parts of the model without its forward, as generation does."""
        return nullcontext()

    def weights(self, model: nn.Module, *, copy: bool) -> dict[str, Tensor]:
        """Whole tensors by name; all ranks call it, and rank 0 alone gets any.

        Args:
            model: not wrapped.
            copy: on the CPU and apart from the model, which trains on.
        """
        found = {name: _on_leader(x, copy=copy) for name, x in model_weights(model).items()}
        return found if group().leads else {}

    def optimizer_state(self, optimizers: Optimizers, *, copy: bool) -> dict[str, Any]:
        """Whole moments as one process has them; all ranks call it, and rank 0 alone gets any."""
        state = _mapped(optimizers.state_dict(), partial(_on_leader, copy=copy))
        return dict(state) if group().leads else {}

    def load_optimizer_state(self, optimizers: Optimizers, state: Mapping[str, Any]) -> None:
        """Put back what `optimizer_state` gave on any engine and any number of ranks.

        Raises:
            CheckpointError: it is of another optimizer.
        """
        optimizers.load_state_dict(state, place=_like_parameter)


ENGINES = Registry("engine", base=Engine, sizes=("device", "precision"))


@ENGINES.register("none")
class OneProcess(Engine):
    """One process has all."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model


@ENGINES.register("ddp")
class DataParallel(Engine):
    """Every rank has all, and gradients are averaged (`DistributedDataParallel`)."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, its gradients averaged over the ranks in its backward."""
        # Looking for unused parameters keeps the first layout of buckets: else it changes after the
        # first backward of a start, and with it the order of sums, so that no restart is bit-exact.
        return _DataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True)

    def accumulating(self, wrapped: nn.Module) -> AbstractContextManager[Any]:
        """Without the exchange of gradients."""
        assert isinstance(wrapped, DistributedDataParallel)
        return wrapped.no_sync()


class _DataParallel(DistributedDataParallel):
    """As torch's, and what it does not have is the model's: ``config``, the experts' loads."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@ENGINES.register("zero1")
class ZeroOne(DataParallel):
    """As ``ddp``, and each rank has the optimizer state of its own part of the parameters.

    ZeRO stage 1 (Rajbhandari et al. 2020, arXiv:1910.02054, sec. 5.1), torch's
    `ZeroRedundancyOptimizer`.
    """

    def optimizers(self, built: Optimizers) -> Optimizers:
        """The same optimizers, sharded."""
        return Optimizers(*map(_sharded, built.parts), names=built.names)

    def optimizer_state(self, optimizers: Optimizers, *, copy: bool) -> dict[str, Any]:
        """Moments of all ranks, sent to rank 0."""
        for part in optimizers.parts:
            assert isinstance(part, ZeroRedundancyOptimizer)
            part.consolidate_state_dict(to=0)
        return super().optimizer_state(optimizers, copy=copy) if group().leads else {}


def _sharded(optimizer: Optimizer) -> Optimizer:
    known = inspect.signature(type(optimizer)).parameters  # some defaults are not for callers
    defaults = {key: value for key, value in optimizer.defaults.items() if key in known}
    return ZeroRedundancyOptimizer(
        [dict(g) for g in optimizer.param_groups], optimizer_class=type(optimizer), **defaults
    )


@ENGINES.register("fsdp")
class FullyShared(Engine):
    """Each rank has a part of every parameter, gradient and moment (torch's `fully_shard`).

    ZeRO stage 3 (arXiv:1910.02054, sec. 5.3; Zhao et al. 2023, arXiv:2304.11277). A block is put
    together when it computes, in the precision of its products.

    Args:
        device: of this rank.
        precision: of matrix products.
        sharding: ``full`` drops a block's parameters after its forward, ``grad_op`` keeps them
            until its backward, ``hybrid`` shards within a machine and copies between machines.
        reduce: precision in which gradients are summed over the ranks.

    Raises:
        ConfigError: fp16, or ``hybrid`` over machines with different numbers of ranks.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        *,
        sharding: Literal["full", "grad_op", "hybrid"] = "full",
        reduce: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        super().__init__(device, precision)
        if precision == "fp16":
            raise ConfigError("training.distributed=fsdp computes in bf16 or fp32, not in fp16")
        self.sharding, self.reduce = sharding, reduce

    def build(self, make: Callable[[], nn.Module], fill: Callable[[nn.Module], None]) -> nn.Module:
        """A model that no rank ever has whole: its matrices get memory once they are shared."""
        with without_memory():
            model = make()
        mesh = self._mesh()
        for block in _blocks(model):
            fully_shard(
                block, mesh=mesh, mp_policy=self._policy(DTYPES[self.precision]),
                reshard_after_forward=self.sharding != "grad_op",
            )  # fmt: skip
        # What is around the blocks stays in fp32, and so does the residual stream.
        fully_shard(model, mesh=mesh, mp_policy=self._policy(torch.float32))
        kept = {
            name: tensor.clone()
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if not tensor.is_meta
        }
        model.to_empty(device=self.device)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in kept:
                    tensor.copy_(kept[name])
            fill(model)
        # The logits of chosen tokens are a view; no objective changes them in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        return model

    @contextmanager
    def generating(self, model: nn.Module) -> Iterator[None]:
        """What is around the blocks is put together; they do that themselves."""
        assert isinstance(model, FSDPModule)
        model._get_fsdp_state()._lazy_init()  # else a block that computes first becomes the root
        model.unshard()
        try:
            yield
        finally:
            model.reshard()

    def _policy(self, dtype: torch.dtype) -> MixedPrecisionPolicy:
        return MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=DTYPES[self.reduce], cast_forward_inputs=False
        )

    def _mesh(self) -> Any:
        world = group().world_size
        if self.sharding != "hybrid":
            return init_device_mesh(self.device.type, (world,))
        locals_ = [int(row[0]) for row in group().gather([group().ranks.local_rank])]
        nodes = locals_.count(0)
        if locals_ != [*range(world // nodes)] * nodes:
            raise ConfigError(
                "training.distributed: sharding=hybrid needs as many ranks on every machine, those "
                f"of one in a row; here their local ranks are {locals_}; use sharding=full"
            )
        return init_device_mesh(
            self.device.type, (nodes, world // nodes), mesh_dim_names=("copies", "parts")
        )

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model itself: its parameters are shared already."""
        shared = all(isinstance(p, DTensor) for p in model.parameters())
        if not (isinstance(model, FSDPModule) and shared):
            raise ConfigError("training.distributed=fsdp was not applied to the whole model")
        return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a decoder, or of a verifier's trunk."""
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            yield from stack


def _on_leader(x: Tensor, *, copy: bool) -> Tensor:
    """A tensor whole on rank 0, and nothing of it on the others; all ranks call it.

    So no device has more than one whole tensor at a time of what the ranks share.

    Args:
        x: all of it, or the part of this rank.
        copy: on the CPU and apart; always so where the ranks have parts.
    """
    full = whole(x)
    if not group().leads:
        return torch.empty(0)
    if full is not x:  # of a single part the whole is that part itself
        return full.detach().to("cpu", copy=copy)
    return x.detach().to("cpu", copy=True) if copy else x


def _mapped(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in nested dicts and lists converted, in a fixed order."""
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, convert) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, convert) for item in value)
    return value


def _like_parameter(parameter: nn.Parameter, moments: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's moments, those of its shape laid out as it is."""
    return {
        name: placed(value, parameter)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in moments.items()
    }


def check_launch(name: str, device: str) -> None:
    """Refuse an engine or a device that the launch does not fit.

    Args:
        name: of the engine.
        device: as the config has it.

    Raises:
        ConfigError: unknown engine, several processes without one, one without a launcher, or one
            GPU for several processes.
    """
    name, world = ENGINES.resolve(name), launched_ranks().world_size
    if name == "none" and world > 1:
        raise ConfigError(
            f"{world} processes were started, but training.distributed=none is one process: each "
            "would train alone and write the same files; start one, or give "
            "training.distributed=ddp (or zero1, fsdp)"
        )
    if name != "none" and not group().together:
        raise ConfigError(
            f"training.distributed={name} needs a launcher: torchrun --nproc-per-node=N -m "
            "modern_llm run ..., or slurm/; or give training.distributed=none"
        )
    if world > 1 and ":" in device:
        raise ConfigError(
            f"training.device={device} is one GPU for {world} processes; give training.device="
            f"{device.partition(':')[0]}, and each takes its own"
        )
