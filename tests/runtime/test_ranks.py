"""Who a process is among several, and what one alone does of what several do."""

import pytest

from modern_llm.errors import ConfigError
from modern_llm.runtime.ranks import Group, Ranks, group, joined, launched_ranks

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "9",
    "MASTER_ADDR": "here", "MASTER_PORT": "1",
}  # fmt: skip


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN, TORCHRUN | {"SLURM_PROCID": "0"}])
def test_the_launcher_says_who_this_is(environ: dict[str, str]) -> None:
    assert launched_ranks(environ) == Ranks(3, 1, 4, launched=True)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # the shell of a job, which srun did not start
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
    ],
)
def test_a_process_without_a_launcher_is_alone(environ: dict[str, str]) -> None:
    assert launched_ranks(environ) == Ranks(0, 0, 1, launched=False)


@pytest.mark.parametrize("name", TORCHRUN)
def test_what_torchrun_did_not_set_is_named(name: str) -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != name}
    if name == "WORLD_SIZE":
        environ |= {"WORLD_SIZE": ""}
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        launched_ranks(environ)


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT", "SLURM_LOCALID"])
def test_what_srun_did_not_set_is_named(name: str) -> None:
    environ = {key: value for key, value in SRUN.items() if key != name}
    with pytest.raises(ConfigError, match=f"{name} is not set"):
        launched_ranks(environ)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": "first"}, "RANK=first, WORLD_SIZE=4, LOCAL_RANK=1: these must be whole numbers"),
        ({"RANK": "4"}, "rank 4 of 4 cannot be"),
        ({"WORLD_SIZE": "0"}, "rank 3 of 0 cannot be"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        launched_ranks(TORCHRUN | changes)


def test_one_process_alone_needs_no_group() -> None:
    with joined(Ranks(), timeout_s=1.0) as alone:
        assert alone is group()
    assert not alone.together
    assert alone.leads
    assert alone.sum([2, 3.5]) == [2, 3.5]
    assert alone.highest(7) == 7
    assert alone.gather([1, 2]) == [[1, 2]]
    assert alone.collect("mine") == ["mine"]
    assert alone.share({"a": 1}) == {"a": 1}
    assert alone.leader(lambda: 5) == 5


def test_an_error_of_one_process_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="Connection"), Group().named(lambda: "somewhere"):
        raise RuntimeError("Connection closed by peer")
