"""The submit scripts on a real SLURM, with a stub in the place of the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("submit_*.sh"))
PRETRAIN = "submit_pretrain_only.sh"
Starts = Callable[[], list[dict[str, Any]]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_sbatch_takes_every_script_and_no_broken_copy(
    script: str, cluster: Any, tmp_path: Path
) -> None:
    accepted = cluster.run("sbatch", "--test-only", f"slurm/{script}")
    assert accepted.returncode == 0, accepted.stderr
    text = (ROOT / "slurm" / script).read_text()
    for line in ("--partition=nowhere", "--partition=short --time=1:00:00", "--cpus-per-task=999"):
        broken = tmp_path / script
        broken.write_text(text.replace("#SBATCH", f"#SBATCH {line}\n#SBATCH", 1))
        assert cluster.run("sbatch", "--test-only", broken).returncode != 0, line


def test_one_task_for_each_gpu_of_each_node(cluster: Any, stub: Any, starts: Starts) -> None:
    job = cluster.submit(
        PRETRAIN, flags=("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"), **stub, CODES="0"
    )
    assert cluster.ended(job).state == "COMPLETED", cluster.log(job)
    told = sorted(starts(), key=lambda one: one["rank"])
    assert [one["rank"] for one in told] == ["0", "1", "2", "3"]
    assert [(one["node"], one["local"]) for one in told] == [
        ("n1", "0"), ("n1", "1"), ("n2", "0"), ("n2", "1"),
    ]  # fmt: skip
    assert {one["gpus"] for one in told} == {"0,1"}, "each sees all, and takes that of its place"
    assert len({one["at"] for one in told}) == 1 and told[0]["at"].startswith("127.0.0.1:")
    assert {one["offline"] for one in told} == {"1"}
    assert all("training.distributed=ddp" in one["line"] for one in told)


def test_torchrun_is_started_once_a_node(cluster: Any, stub: Any, starts: Starts) -> None:
    flags = ("--nodes=2", "--ntasks-per-node=2")
    job = cluster.submit(PRETRAIN, flags=flags, **stub, CODES="0", LAUNCHER="torchrun")
    assert cluster.ended(job).state == "COMPLETED", cluster.log(job)
    assert sorted(one["node"] for one in starts()) == ["n1", "n2"]
    for one in starts():
        assert " -m torch.distributed.run --nnodes=2 --nproc-per-node=2 " in one["line"]
        assert "SIGUSR1" in one["line"].split("--signals-to-handle=")[1].split()[0]


@pytest.mark.parametrize("code", [2, 3, 6])
def test_what_would_fail_again_is_not_started_again(
    code: int, cluster: Any, stub: Any, starts: Starts
) -> None:
    job = cluster.submit(PRETRAIN, **stub, CODES=str(code))
    ended = cluster.ended(job)
    assert (ended.state, ended.code, ended.restarts, len(starts())) == ("FAILED", code, 0, 1)


def test_a_failed_check_starts_nothing(cluster: Any, stub: Any, starts: Starts) -> None:
    job = cluster.submit(PRETRAIN, **stub, CHECK="3", CODES="0")
    after = cluster.submit(
        "submit_alignment.sh",
        flags=(f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"), **stub, CODES="0",
    )  # fmt: skip
    ended = cluster.ended(job)
    assert (ended.state, ended.code, ended.restarts) == ("FAILED", 3, 0)
    assert "what is wrong" in cluster.log(job)
    assert cluster.ended(after).state == "CANCELLED"
    assert starts() == []


def test_without_progress_a_job_gives_up_after_three_starts(
    cluster: Any, stub: Any, starts: Starts
) -> None:
    job = cluster.submit(PRETRAIN, **stub, CODES="1")
    ended = cluster.ended(job)
    assert (ended.state, ended.code, len(starts())) == ("FAILED", 76, 3)
    log = cluster.log(job)
    assert log.count(", started again ") == 3, "the log of each start is kept"
    assert "3 starts in a row made no progress" in log


def test_with_progress_it_is_stopped_as_often_as_it_likes(
    cluster: Any, stub: Any, starts: Starts
) -> None:
    job = cluster.submit(PRETRAIN, **stub, PROGRESS="yes", CODES="75 75 137 7 0")
    ended = cluster.ended(job, timeout_s=90)
    assert (ended.state, ended.code, ended.restarts, len(starts())) == ("COMPLETED", 0, 4, 5)


def test_preemption_without_progress_counts_too(cluster: Any, stub: Any, starts: Starts) -> None:
    """Then nothing after srun is run: only the next start can see it."""
    job = cluster.submit(PRETRAIN, **stub, CODES="0", SECONDS_EACH="60")
    for start in (1, 2, 3):
        cluster.until(job, lambda _, n=start: len(starts()) == n)
        cluster.ask("scontrol", "requeue", job)
    ended = cluster.ended(job)
    assert (ended.state, ended.code, len(starts())) == ("FAILED", 76, 3)


def test_time_limit_is_a_stop_with_another_start(cluster: Any, stub: Any, starts: Starts) -> None:
    job = cluster.submit(
        PRETRAIN, flags=("--time=1", "--signal=USR1@55"), **stub,
        CODES="0", SECONDS_EACH="120", FIRST_ONLY="yes",
    )  # fmt: skip
    ended = cluster.ended(job, timeout_s=120)
    assert (ended.state, ended.restarts, len(starts())) == ("COMPLETED", 1, 2)
    assert "stopped by a signal after saving" in cluster.log(job)


def test_a_cancelled_job_stays_cancelled(cluster: Any, stub: Any, starts: Starts) -> None:
    job = cluster.submit(PRETRAIN, **stub, CODES="75", SECONDS_EACH="60")
    cluster.until(job, lambda _: len(starts()) == 1)
    cluster.ask("scancel", job)
    ended = cluster.ended(job)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0)


def test_a_chain_goes_on_until_the_run_is_done(cluster: Any, stub: Any, starts: Starts) -> None:
    submitted = cluster.run(
        "bash", f"slurm/{PRETRAIN}", f"--output={cluster.base}/%j.log",
        **stub, CHAIN="4", TIME_LIMIT="5", PROGRESS="yes", CODES="75 75 0",
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    jobs = [int(line.split()[-1]) for line in submitted.stderr.splitlines() if "submitted" in line]
    ended = [cluster.ended(job) for job in jobs]
    assert [job.code for job in ended] == [75, 75, 0, 0]
    assert [job.restarts for job in ended] == [0, 0, 0, 0]
    assert len(starts()) == 3, "the last finds the run done"
    assert ended[0].fields["TimeLimit"] == "00:05:00"


def test_by_hand_a_failed_check_submits_nothing(cluster: Any, stub: Any) -> None:
    refused = cluster.run("bash", f"slurm/{PRETRAIN}", **stub, CHECK="2", CODES="0")
    assert refused.returncode == 2
    assert "what is wrong" in refused.stdout
    assert cluster.ask("squeue", "--noheader") == ""


def test_a_script_given_from_elsewhere_says_where_to_stand(cluster: Any, tmp_path: Path) -> None:
    own = (f"--output={tmp_path}/log", ROOT / "slurm" / PRETRAIN)
    given = cluster.run("sbatch", "--parsable", *own, cwd=tmp_path)
    assert cluster.ended(int(given.stdout)).code == 2
    assert "from the repository's root" in (tmp_path / "log").read_text()


def test_alignment_starts_from_the_newest_checkpoint_and_stays_with_it(
    cluster: Any, stub: Any, starts: Starts
) -> None:
    """The stub adds to what stands there, as a pretraining that goes on would."""
    pretrain = Path(stub["OUTPUT_DIR"]) / "r" / "pretrain"
    for step in ("step-00000002", "step-00000010"):
        (pretrain / "checkpoints" / step).mkdir(parents=True)
    job = cluster.submit("submit_alignment.sh", **stub, PROGRESS="yes", CODES="75 0")
    assert cluster.ended(job).state == "COMPLETED", cluster.log(job)
    first, second = (one["line"].split("--checkpoint ")[1].split()[0] for one in starts())
    assert first == second == str(pretrain / "checkpoints" / "step-00000010")
    assert (pretrain / "checkpoints" / "step-1").exists(), "there was another choice"

    (pretrain / "final").mkdir()
    job = cluster.submit("submit_alignment.sh", **stub, CODES="0")
    assert cluster.ended(job).state == "COMPLETED", cluster.log(job)
    assert "--checkpoint" not in starts()[-1]["line"]
