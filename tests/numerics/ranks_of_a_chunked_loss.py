"""Two ranks take the gradient of a chunked loss; run by ``test_chunked_loss_ranks.py``.

Prints, for each engine, the largest relative error of any parameter's gradient against one process
that sees all rows and takes the loss of all logits.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modern_llm.config import ModelConfig
from modern_llm.data.collate import TokenBatch
from modern_llm.models import ModernDecoderLM
from modern_llm.training import LMObjective


def make_model(tied: bool) -> ModernDecoderLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, d_model=32, n_layers=2, n_heads=4, max_seq_len=24)
    return ModernDecoderLM(ModelConfig(**sizes, tie_embeddings=tied))


def wrapped(model: ModernDecoderLM, engine: str) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tokens = torch.randint(0, 61, (4, 25), generator=torch.Generator().manual_seed(1))
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    for tied in (False, True):
        exact = make_model(tied)
        LMObjective()(exact, TokenBatch(inputs, labels)).loss_sum.backward()
        for engine in ("ddp", "fsdp"):
            model = make_model(tied)
            ours = wrapped(model, engine)
            for row in range(rank, len(tokens), world_size):  # two micro-batches
                batch = TokenBatch(inputs[row : row + 1], labels[row : row + 1])
                LMObjective(chunk=10)(ours, batch).loss_sum.backward()
            errors = []
            for p, reference in zip(model.parameters(), exact.parameters(), strict=True):
                mean = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                error = mean * world_size - reference.grad  # gradients are means over ranks
                errors.append(float(error.norm() / reference.grad.norm()))
            if rank == 0:
                print(engine, tied, max(errors), flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo and FSDP2 abort the interpreter's own exit now and then


if __name__ == "__main__":
    main()
