"""Processes that train together: who they are, what they tell each other, what ends all of them.

The launcher starts every rank with the same command: ``torchrun``, ``accelerate launch``, or
``srun`` with one task a device. Rank 0 leads: it alone prepares data, samples, scores and writes;
the others wait for its orders and take part where a model is trained.

Waits in a training step have a time limit: who does not answer is dead. The wait for rank 0's word
has none, because it may prepare data for hours; a rank that dies closes its connections, and that
ends both waits at once.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from modern_llm.errors import ConfigError, ModernLLMError, PeerError
from modern_llm.runtime.artifacts import to_json

T = TypeVar("T")
PATIENCE = timedelta(days=30)
LINGER_S = 1.0
NOTHING: dict[str, Any] = {}  # to be told
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "MASTER_ADDR", "MASTER_PORT")
# What torch says of a connection that broke or a wait that ended, by backend.
LOST = ("gloo", "NCCL", "Connection", "Timed out", "timed out", "Socket", "recv", "Broken pipe")


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together."""

    rank: int = 0
    local_rank: int = 0  # on this machine
    world_size: int = 1
    launched: bool = False  # by a launcher of several, even if it started one


def launched_ranks(environ: Mapping[str, str] = os.environ) -> Ranks:
    """What the launcher says of this process; one process where there was none.

    Raises:
        ConfigError: it says a part of it only, or what it says cannot be.
    """
    if "RANK" in environ or environ.get("WORLD_SIZE", "1") != "1":
        names, launcher = TORCHRUN, "torchrun or accelerate launch"
    elif "SLURM_STEP_NUM_TASKS" in environ and "SLURM_PROCID" in environ:
        if environ["SLURM_STEP_NUM_TASKS"] == "1" and "MASTER_ADDR" not in environ:
            return Ranks()
        names, launcher = SRUN, "srun"
    else:
        return Ranks()
    if missing := [name for name in names if not environ.get(name)]:
        raise ConfigError(
            f"{launcher} started this process, but {', '.join(missing)} is not set; "
            "start it with torchrun, or by slurm/common.sh, which sets all of them"
        )
    try:
        rank, world_size, local_rank = (int(environ[name]) for name in names[:3])
    except ValueError:
        given = ", ".join(f"{name}={environ[name]}" for name in names[:3])
        raise ConfigError(f"{given}: these must be whole numbers") from None
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} of {world_size} cannot be; check the launcher")
    return Ranks(rank, local_rank, world_size, launched=True)


def own_gpu(ranks: Ranks) -> int:
    """Number of this rank's GPU among those that it can see.

    Raises:
        ConfigError: there are fewer than ranks on this machine.
    """
    count = torch.cuda.device_count()
    if count == 1 and ranks.local_rank and "CUDA_VISIBLE_DEVICES" in os.environ:
        return 0  # the launcher shows each rank its own
    if ranks.local_rank >= count:
        raise ConfigError(
            f"{socket.gethostname()} has {count} GPUs, and rank {ranks.rank} is number "
            f"{ranks.local_rank + 1} there; start as many ranks a machine as it has GPUs"
        )
    return ranks.local_rank


class Group:
    """All ranks of a run; a process that is alone needs nothing of torch's.

    Args:
        ranks: this process among all.
        timeout_s: longest wait for the others inside a training step.
        store: where ranks leave notes, for those that are many.
    """

    def __init__(
        self, ranks: Ranks = Ranks(), *, timeout_s: float = 0.0, store: Any = None
    ) -> None:
        self.ranks, self.timeout_s = ranks, timeout_s
        self._in_step = False  # all ranks compute: nobody waits for an order
        self._alone = False  # in step, but the others wait for what rank 0 says of its work
        self._store = store
        self._counts = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if store else None
        )

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.ranks.world_size

    @property
    def together(self) -> bool:
        """Whether there is a group of torch's, be it of one."""
        return self._store is not None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes results."""
        return self.ranks.rank == 0

    @property
    def may_leave(self) -> bool:
        """Whether this rank may end its work here: the others wait, and are told."""
        return self.world_size == 1 or (self.leads and (self._alone or not self._in_step))

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks of a few numbers; counts are exact up to 2^53."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def sum_tensors(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sums over all ranks of tensors on the device, of the same names and shapes on each."""
        if self.world_size == 1:
            return dict(named)
        flat = torch.cat([tensor.detach().double().reshape(-1) for tensor in named.values()])
        dist.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in named.values()])
        return {
            name: part.view(tensor.shape)
            for (name, tensor), part in zip(named.items(), parts, strict=True)
        }

    def highest(self, value: int) -> int:
        """The highest value of any rank."""
        return int(self._reduce([value], dist.ReduceOp.MAX)[0])

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.world_size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, op=operation, group=self._counts)
        result: list[float] = sums.tolist()
        return result

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The values of every rank, in order of the ranks."""
        own = torch.tensor(values, dtype=torch.float64)
        if self.world_size == 1:
            return [own.tolist()]
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own, group=self._counts)
        return [row.tolist() for row in rows]

    def collect(self, value: Any) -> list[Any]:
        """The values of all ranks on rank 0, and nothing on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.leads else None
        dist.gather_object(value, values, dst=0, group=self._counts)
        return values or []

    def share(self, value: T | None) -> T:
        """Rank 0's value, which is plain JSON, on every rank; the others' is not looked at."""
        if self.world_size == 1:
            return value  # type: ignore[return-value]
        text = to_json(value).encode() if self.leads else b""
        size = torch.tensor([len(text)], dtype=torch.int64)
        self._broadcast(size)
        data = torch.empty(int(size), dtype=torch.uint8)
        if self.leads:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._broadcast(data)
        shared: T = json.loads(bytes(data.tolist()))
        return shared

    def _broadcast(self, data: Tensor) -> None:
        """Send rank 0's ``data`` to all, who wait for it as long as it takes."""
        assert self._counts is not None
        patient = dist.BroadcastOptions()
        patient.rootRank, patient.timeout = 0, PATIENCE
        self._counts.broadcast([data], patient).wait()  # dist.broadcast takes no limit

    def leader(self, call: Callable[[], T]) -> T:
        """What ``call`` returns on rank 0 (plain JSON), on every rank; the others do not call.

        Raises:
            PeerError: it failed on rank 0, which has the error itself.
        """
        value: T | None = None
        with self.leader_first():
            if self.leads:
                value = call()
        return self.share(value)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Rank 0's work; however it ends, the ranks that wait for an order are sent home."""
        told = {"message": "", "exit_code": 0}
        try:
            yield
        except BaseException as error:
            told = _failure(error)
            raise
        finally:
            if not self._in_step:
                self.share({"end": told})

    @contextmanager
    def ordered(self, order: Mapping[str, Any]) -> Iterator[None]:
        """Rank 0's part of what all ranks do in step; the others get the order."""
        self._in_step = True
        self.share({"do": order})
        yield
        self._in_step = False  # not after a failure: nobody waits then

    def orders(self) -> Iterator[dict[str, Any]]:
        """Rank 0's orders, one after the other until it is done.

        Raises:
            PeerError: it failed.
        """
        while "do" in (told := self.share(NOTHING)):
            yield told["do"]
        if told["end"]["exit_code"]:
            raise PeerError(**told["end"])

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """The block, on rank 0 first; on the others when rank 0 is through with it.

        So that what rank 0 prepares is there when the others read it.

        Raises:
            PeerError: it failed on rank 0, which has the error itself.
        """
        if not self.leads and (failed := self.share(NOTHING)):
            raise PeerError(failed["message"], exit_code=failed["exit_code"])
        try:
            self._alone = self.leads
            yield
            self._alone = False
        except BaseException as error:
            self._alone = False
            if self.leads:
                self.share(_failure(error))
            raise
        if self.leads:
            self.share(NOTHING)

    def tells(self, error: ModernLLMError) -> bool:
        """Whether this rank is the one that tells of the end: the first that came to it.

        Args:
            error: which this rank ends with.
        """
        if self._store is None:
            return True
        try:
            mine = str(self.ranks.rank)
            first = bool(self._store.compare_set("tells", "", mine).decode() == mine)
            asked, until = self._store.add("asked", 1), time.monotonic() + LINGER_S
            while self.leads and asked < self.world_size and time.monotonic() < until:
                time.sleep(0.02)  # the store may be in this process: the others ask it too
                asked = self._store.add("asked", 0)
            return first
        except RuntimeError:  # the store was in a process that is gone, perhaps without a word
            return isinstance(error, PeerError)

    @contextmanager
    def named(self, where: Callable[[], str]) -> Iterator[None]:
        """Tell what torch raises when ranks are lost as one message.

        Args:
            where: what the ranks were doing.

        Raises:
            PeerError: names this rank, its host, what it was doing, and what is known of the cause.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1:
                raise
            lost = isinstance(error, dist.DistError) or any(s in str(error) for s in LOST)
            if not lost:
                raise
            first = str(error).strip().splitlines()[0]
            raise PeerError(
                f"rank {self.ranks.rank} of {self.world_size} on {socket.gethostname()}, "
                f"{where()}: another rank died or did not answer within {self.timeout_s:g} s "
                f"({first}); logs/rank-*.log of the run tell more, the last checkpoint stands, and "
                "the same command goes on from it"
            ) from error


def _failure(error: BaseException) -> dict[str, Any]:
    """What rank 0 tells the others of its own end."""
    return {"message": f"rank 0 failed: {error}", "exit_code": getattr(error, "exit_code", 1)}


_group = Group()


def group() -> Group:
    """The group of this process."""
    return _group


@contextmanager
def joined(ranks: Ranks, *, timeout_s: float, on_gpu: bool = True) -> Iterator[Group]:
    """Join the group of all ranks, and leave it at the end.

    Args:
        ranks: as the launcher says; see `launched_ranks`.
        timeout_s: longest wait for the others inside a training step, and for them to come.
        on_gpu: each rank takes a GPU of its own where there are any.

    Raises:
        ConfigError: this machine has fewer GPUs than ranks.
        PeerError: the others did not come in time.
    """
    global _group
    if not ranks.launched:
        yield _group
        return
    limit = timedelta(seconds=timeout_s)
    store, start = None, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # one store for all
    try:
        if on_gpu and torch.cuda.is_available():
            torch.cuda.set_device(own_gpu(ranks))
        store, rank, world_size = next(
            rendezvous(f"env://?rank={ranks.rank}&world_size={ranks.world_size}", timeout=limit)
        )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(
            backend, store=PrefixStore(f"group-{start}", store), rank=rank, world_size=world_size,
            timeout=limit,
        )  # fmt: skip
        _group = Group(ranks, timeout_s=timeout_s, store=PrefixStore(f"notes-{start}", store))
    except ConfigError as error:
        error.told = False  # the others have GPUs, and do not know
        raise
    except (RuntimeError, OSError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        failure = PeerError(
            f"rank {ranks.rank} of {ranks.world_size} on {socket.gethostname()} did not meet the "
            f"others at {place} within {timeout_s:g} s ({str(error).splitlines()[0]}); are all "
            "ranks started, and is that address reachable from each?"
        )
        failure.told = ranks.rank > 0 and store is not None  # rank 0 was met, and tells
        raise failure from None
    try:
        with _group.named(lambda: "between two stages"):
            yield _group
        dist.destroy_process_group()  # not after a failure: it would wait for who is dead
    except ModernLLMError as error:  # one rank tells what all of them see
        error.told = bool(error.told) or not _group.tells(error)
        raise
    finally:
        _group = Group()
