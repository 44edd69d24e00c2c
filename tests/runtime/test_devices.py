import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from modern_llm.errors import ConfigError
from modern_llm.runtime import devices
from modern_llm.runtime.devices import (
    autocast,
    check_precision,
    hardware,
    keep_freed_memory,
    memory_gb,
    memory_row,
    peak_memory_gb,
    resolve_device,
    resolve_precision,
    set_threads,
)
from modern_llm.runtime.environment import cpu_name

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there are so many GPUs."""

    def pretend(count: int, *, bf16: bool = True) -> None:
        def supported(including_emulation: bool = True) -> bool:
            return bf16 or including_emulation  # every GPU can emulate it

        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return pretend


def test_auto_takes_what_there_is(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    assert resolve_device().type == resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    gpus(1)
    assert resolve_device("auto").type == resolve_device("cuda").type == "cuda"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "meta", "xpu"])
def test_an_absent_device_is_refused(gpus: Any, name: str) -> None:
    gpus(0)
    with pytest.raises(ConfigError, match=f"training.device: '{name}' is not available here"):
        resolve_device(name)


def test_a_refusal_names_the_field(gpus: Any) -> None:
    gpus(0)
    for name in ("cuda", "tpu9"):
        with pytest.raises(ConfigError, match=r"^eval\.device: "):
            resolve_device(name, field="eval.device")
    with pytest.raises(ConfigError, match=r"^eval\.precision: fp16"):
        check_precision("fp16", CPU, field="eval.precision")
    gpus(1, bf16=False)
    with pytest.raises(ConfigError, match=r"^eval\.device: 'cuda:1'"):
        resolve_device("cuda:1", field="eval.device")
    with pytest.raises(ConfigError, match=r"^eval\.precision: this GPU"):
        check_precision("bf16", torch.device("cuda"), field="eval.precision")


def test_a_gpu_beyond_the_last_is_refused(gpus: Any) -> None:
    gpus(2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match=r"'cuda:2' is not here; the last of 2 is cuda:1"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu cuda"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown device"):
        resolve_device(name)


def test_precision_is_checked_not_assumed(gpus: Any) -> None:
    for precision in ("fp32", "bf16"):
        check_precision(precision, CPU)
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        check_precision("fp16", CPU)
    gpus(1)
    for precision in ("fp32", "bf16", "fp16"):
        check_precision(precision, torch.device("cuda"))
    gpus(1, bf16=False)
    with pytest.raises(ConfigError, match="no bf16; use fp16 or fp32"):
        check_precision("bf16", torch.device("cuda"))


def test_precision_auto_is_what_the_device_is_fast_in(
    gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    gpus(1)
    assert resolve_precision("auto", cuda) == "bf16"
    gpus(1, bf16=False)
    assert resolve_precision("auto", cuda) == "fp16"
    assert resolve_precision("fp32", cuda) == "fp32"
    assert resolve_precision("auto", torch.device("mps")) == "fp32"
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    for avx, amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda found=avx: found)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=amx: found)
        assert resolve_precision("auto", CPU) == ("bf16" if avx or amx else "fp32")
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    assert resolve_precision("auto", CPU) == "fp32"


def test_freed_memory_is_kept_only_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Glibc:
        @staticmethod
        def mallopt(option: int, value: int) -> None:
            asked.append((option, value))

    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: Glibc)
    keep_freed_memory()
    assert dict(asked) == {-3: 1 << 30, -1: 1 << 30, -4: 0}
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: object())  # another C library
    keep_freed_memory()

    def none(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(devices.ctypes, "CDLL", none)
    keep_freed_memory()
    assert len(asked) == 3


def test_autocast_computes_in_the_precision() -> None:
    x = torch.ones(2, 2)
    with autocast(CPU, "bf16"):
        assert (x @ x).dtype == torch.bfloat16
    assert isinstance(autocast(CPU, "fp32"), nullcontext)
    with autocast(CPU, "fp32"):
        assert (x @ x).dtype == torch.float32


def test_threads() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(1)
        assert torch.get_num_threads() == 1
        set_threads(None)
        assert torch.get_num_threads() == 1
    finally:
        set_threads(before)


def test_memory_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_gb(CPU) == pytest.approx(psutil.Process().memory_info().rss / 1e9, rel=0.05)

    def no_proc(path: str) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr(devices, "open", no_proc, raising=False)  # as on macOS
    assert memory_gb(CPU) == peak_memory_gb(CPU)


def test_the_most_memory_stays_when_it_is_freed() -> None:
    block = torch.ones(100_000_000)  # 0.4 GB, written to
    row = memory_row(CPU)
    assert set(row) == {"memory_gb", "memory_peak_gb"}
    del block
    assert peak_memory_gb(CPU) >= 0.4
    assert row["memory_peak_gb"] >= row["memory_gb"] - 0.01


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_most_memory_is_not_that_of_the_parent() -> None:
    """Linux hands a parent's peak on to its child's ru_maxrss; a sweep starts many children."""
    block = torch.ones(300_000_000)  # 1.2 GB, written to
    program = (
        "import torch; from modern_llm.runtime.devices import peak_memory_gb; "
        "print(peak_memory_gb(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert block.sum() > 0 and done.returncode == 0, done.stderr
    assert float(done.stdout) < 1


def test_hardware_says_what_computes() -> None:
    told = hardware(CPU)
    assert told["device"] == "cpu"
    assert told["threads"] == torch.get_num_threads()
    assert told["cores"] == os.cpu_count()
    assert told["name"] == cpu_name()
    assert told["memory_gb"] == pytest.approx(psutil.virtual_memory().total / 1e9, abs=0.1)


def test_a_gpu_is_told_with_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA Made-up", total_memory=80_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    told = hardware(torch.device("cuda"))
    assert (told["name"], told["memory_gb"]) == ("NVIDIA Made-up", 80.0)

    counts = {"memory_allocated": 1e9, "max_memory_allocated": 2e9, "memory_reserved": 3e9}
    for name, value in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    row = memory_row(torch.device("cuda"))
    assert row == {"memory_gb": 1.0, "memory_peak_gb": 2.0, "memory_reserved_gb": 3.0}
