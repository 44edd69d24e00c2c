"""The chunked loss under DDP and FSDP2 gives the gradient of one process and all logits."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("ranks_of_a_chunked_loss.py")


def test_two_ranks_give_the_gradient_of_one_process() -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*launch, str(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    told = [line.split() for line in done.stdout.splitlines()]
    cases = [("ddp", "False"), ("fsdp", "False"), ("ddp", "True"), ("fsdp", "True")]
    assert [(engine, tied) for engine, tied, _ in told] == cases
    assert all(float(error) < 2e-6 for _, _, error in told)
