"""A SLURM of one machine for the submit scripts: munged, slurmctld and slurmd in a scratch folder.

Each worker of pytest-xdist that needs one starts its own; one test at a time has the machine.
"""

import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
CPUS = 4  # that SLURM believes in: two jobs of two tasks
CONF = """\
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={base}/socket/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort={ports[0]}
SlurmdParameters=config_overrides
StateSaveLocation={base}/ctl
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
MpiDefault=none
ReturnToService=2
KillWait=20
MinJobAge=600
SchedulerParameters=sched_interval=2,batch_sched_delay=1
EnforcePartLimits=ALL
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} Gres=gpu:2
PartitionName=dev Nodes=n[1-2] Default=YES MaxTime=2-00:00:00 State=UP
PartitionName=short Nodes=n[1-2] MaxTime=00:05:00 State=UP
"""
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

# Stands for the interpreter with the package. Each start leaves a line in $STUB/starts, adds a
# checkpoint if there is a PROGRESS, and ends with the code at its place in CODES (or the last).
STUB = """\
#!/bin/bash
case "$*" in
*--dry-run*)
    [ "${CHECK:-0}" = 0 ] || echo "what is wrong"
    [ -z "${MODERN_LLM_STATUS_FILE-}" ] || echo '{"exit_code": 0}' >"$MODERN_LLM_STATUS_FILE"
    exit "${CHECK:-0}" ;;
esac
printf '%s\\n' "rank=$SLURM_PROCID local=$SLURM_LOCALID node=$SLURMD_NODENAME\
 gpus=${CUDA_VISIBLE_DEVICES-} at=${MASTER_ADDR-}:${MASTER_PORT-} offline=$HF_HUB_OFFLINE $*" \
    >>"$STUB/starts"
[ "$SLURM_PROCID" = 0 ] || exit 0
start=$(grep -c 'rank=0 ' "$STUB/starts")
[ -z "${PROGRESS-}" ] || mkdir -p "$OUTPUT_DIR/$RUN_NAME/pretrain/checkpoints/step-$start"
trap 'printf "{\\"exit_code\\": 75}" >"$MODERN_LLM_STATUS_FILE"; exit 75' USR1
for ((i = 0; i < 10 * ${SECONDS_EACH:-0}; i++)); do
    [ "$start" -gt 1 ] && [ -n "${FIRST_ONLY-}" ] && break
    sleep 0.1
done
read -r -a codes <<<"$CODES"
code=${codes[start - 1]:-${codes[-1]}}
[ "$code" != 137 ] || kill -9 $$
printf '{"exit_code": %s, "reason": "as told"}' "$code" >"$MODERN_LLM_STATUS_FILE"
exit "$code"
"""


@dataclass(frozen=True)
class Job:
    """What ``scontrol`` says of a job."""

    fields: Mapping[str, str]

    @property
    def state(self) -> str:
        return self.fields["JobState"]

    @property
    def code(self) -> int:
        """Exit code of the script."""
        return int(self.fields["ExitCode"].split(":")[0])

    @property
    def restarts(self) -> int:
        return int(self.fields["Restarts"])


@dataclass
class Cluster:
    """A running SLURM; ``env`` is what its commands need."""

    base: Path
    env: dict[str, str]
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def run(
        self, *words: object, cwd: Path = ROOT, **variables: str
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command, from the repository's root, in a fresh environment."""
        return subprocess.run(
            [*map(str, words)], env=self.env | variables, cwd=cwd,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def ask(self, *words: object, **variables: str) -> str:
        """The same for a command that must succeed; its output."""
        done = self.run(*words, **variables)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def submit(
        self, script: str, *words: str, flags: tuple[str, ...] = (), **variables: str
    ) -> int:
        """Give a script of ``slurm/`` to sbatch; returns the job's id."""
        own = ("sbatch", "--parsable", f"--output={self.base}/%j.log", *flags)
        return int(self.ask(*own, f"slurm/{script}", *words, **variables))

    def job(self, number: int) -> Job:
        shown = self.ask("scontrol", "--oneliner", "show", "job", number).splitlines()[0]
        return Job(dict(re.findall(r"(\w+)=(\S*)", shown)))

    def log(self, number: int | str) -> str:
        path = self.base / f"{number}.log"
        return path.read_text() if path.exists() else ""

    def until(self, number: int, happened: Callable[[Job], bool], *, timeout_s: float = 60) -> Job:
        """Wait for something about a job; SLURM's pause before another start is shortened.

        Not to nothing: in the second in which credentials of a job were revoked, slurmd lets it
        fail without a word.
        """
        end, waits_since = time.monotonic() + timeout_s, 0.0
        while not happened(job := self.job(number)):
            waits = job.state not in ENDED and time.monotonic() < end
            assert waits, f"{job.fields}\n{self.log(number)}"
            if job.state != "PENDING" or job.fields["Reason"] != "BeginTime":
                waits_since = time.monotonic()
            elif time.monotonic() - waits_since > 2.5:
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now")
            time.sleep(0.2)
        return job

    def ended(self, number: int, *, timeout_s: float = 60) -> Job:
        return self.until(number, lambda job: job.state in ENDED, timeout_s=timeout_s)

    def stop(self) -> None:
        self.run("scancel", "--user", self.env["USER"])
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            process.wait(20)


def _die_with_parent() -> None:
    """Of a daemon: end when the process of the tests is gone, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _start(base: Path) -> Cluster:
    """Start the daemons below ``base``, whose path must be short: sockets are in it."""
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    host = subprocess.run(["hostname", "-s"], capture_output=True, text=True, check=True).stdout
    for name in ("etc", "ctl", "spool/n1", "spool/n2", "log", "run", "munge", "socket"):
        (base / name).mkdir(parents=True)
    base.chmod(0o755)  # munged refuses a socket that others cannot reach
    (base / "munge").chmod(0o700)
    (base / "munge" / "key").write_bytes(os.urandom(128))
    (base / "munge" / "key").chmod(0o400)
    conf, ports = base / "etc" / "slurm.conf", _free_ports(3)
    conf.write_text(CONF.format(user=user, base=base, ports=ports, host=host.strip(), cpus=CPUS))
    devices = "".join(f"Name=gpu File=/dev/{name}\n" for name in ("null", "zero"))
    (base / "etc" / "gres.conf").write_text(devices)

    own = ("SLURM", "SBATCH", "MODERN_LLM", "HF_")  # of a job that these tests may run in
    env = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    source = str(ROOT / "src")
    env |= {"SLURM_CONF": str(conf), "PATH": SBIN, "USER": user, "PYTHON": sys.executable}
    env |= {"PYTHONPATH": source, "NO_COLOR": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    cluster = Cluster(base, env)
    munge = [f"--{name}-file={base}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", f"--socket={base}/socket/munge.socket", *munge],
        ["slurmctld", "-D", "-c", "-f", str(conf)],
        ["slurmd", "-D", "-N", "n1", "-f", str(conf)],
        ["slurmd", "-D", "-N", "n2", "-f", str(conf)],
    ]
    for command in commands:
        with (base / "log" / f"{len(cluster.processes)}-{command[0]}.txt").open("wb") as out:
            cluster.processes.append(
                subprocess.Popen(
                    command, env=env, stdout=out, stderr=out, preexec_fn=_die_with_parent
                )
            )
        time.sleep(0.3)  # munged is asked at once by those that follow
    return cluster


@pytest.fixture(scope="session")
def started() -> Iterator[Cluster]:
    """The daemons, once for this process."""
    missing = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=SBIN) is None]
    if missing:
        how = "apt-get install --no-install-recommends slurm-wlm munge"
        pytest.skip(f"{', '.join(missing)} not installed: {how}")
    base = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = _start(base)
    try:
        end = time.monotonic() + 30
        wanted = {"n1 idle", "n2 idle"}
        while set(cluster.run("sinfo", "-N", "-h", "-o", "%N %T").stdout.splitlines()) != wanted:
            if time.monotonic() > end:
                logs = "".join(path.read_text()[-1500:] for path in (base / "log").iterdir())
                raise AssertionError(f"SLURM did not come up:\n{logs}")
            time.sleep(0.2)
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """The SLURM, for one test at a time of all processes that run tests."""
    with (Path(tempfile.gettempdir()) / f"modern_llm-slurm-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield started
        started.run("scancel", "--user", started.env["USER"])


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """Variables with which a script starts a program that only tells of its starts."""
    program = tmp_path / "stub"
    program.write_text(STUB)
    program.chmod(0o755)
    out = tmp_path / "out"
    return {"PYTHON": str(program), "STUB": str(tmp_path), "OUTPUT_DIR": str(out), "RUN_NAME": "r"}


@pytest.fixture
def starts(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What every process that the stub stood for was given."""

    def read() -> list[dict[str, Any]]:
        path = tmp_path / "starts"
        lines = path.read_text().splitlines() if path.exists() else []
        own = r"(rank|local|node|gpus|at|offline)=(\S*)"
        return [{**dict(re.findall(own, line.split(" -m ")[0])), "line": line} for line in lines]

    return read
