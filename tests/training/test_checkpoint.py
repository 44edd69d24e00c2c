import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modern_llm.errors import CheckpointError, DivergedError, ProtectedPathError
from modern_llm.models import ModernDecoderLM
from modern_llm.models.weights import model_weights
from modern_llm.runtime.artifacts import sha256_file, to_json
from modern_llm.training import (
    load_model_weights,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from modern_llm.training.checkpoint import FORMAT, read_trainer_state

Models = Callable[..., ModernDecoderLM]
FILES = ("model.safetensors", "config.json", "tokenizer.json", "trainer.pt", "manifest.json")


def write(target: Path, model: torch.nn.Module, **changes: Any) -> str:
    parts: dict[str, Any] = {
        "weights": model_weights(model),
        "meta": {"stage": "sft", "step": 3, "model": model.config.model_dump(mode="json")},
        "tokenizer_json": '{"a": 1}',
        "trainer_state": {"rng": torch.get_rng_state(), "step": 3},
    }
    return write_checkpoint(target, **{**parts, **changes})


@pytest.fixture
def folder(tmp_path: Path, make_model: Models) -> Path:
    write(tmp_path / "step-00000003", make_model())
    return tmp_path / "step-00000003"


def test_round_trip(tmp_path: Path, make_model: Models) -> None:
    model = make_model()
    digest = write(tmp_path / "c", model)
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == sorted(FILES)
    checkpoint = read_checkpoint(tmp_path / "c")
    assert checkpoint.sha256 == digest == sha256_file(tmp_path / "c" / "manifest.json")
    assert checkpoint.meta["step"] == 3
    assert checkpoint.meta["format"] == FORMAT
    assert checkpoint.tokenizer_path.read_text() == '{"a": 1}'
    assert torch.equal(checkpoint.trainer_state()["rng"], torch.get_rng_state())
    other = make_model(init_std=0.5)
    load_model_weights(other, checkpoint)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob(".tmp-*"))


def test_tied_and_compiled_weights_have_plain_names_and_one_storage(make_model: Models) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(8, 4)
            self.head = torch.nn.Linear(4, 8, bias=False)
            self.head.weight = self.embedding.weight

    assert list(model_weights(Tied())) == ["embedding.weight"]
    compiled = torch.compile(Tied())
    assert list(model_weights(compiled)) == ["embedding.weight"]
    assert set(model_weights(make_model())) == set(dict(make_model().named_parameters()))


def test_tied_weights_stay_tied_after_load(tmp_path: Path, make_model: Models) -> None:
    write(tmp_path / "c", make_model())
    other = make_model()
    before = other.embedding.weight.data_ptr()
    load_model_weights(other, read_checkpoint(tmp_path / "c"))
    assert other.embedding.weight.data_ptr() == before


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_detected(folder: Path, name: str) -> None:
    path = folder / name
    data = bytearray(path.read_bytes())
    step = max(1, len(data) // 25)
    for place in range(0, len(data), step):
        for bit in (0, 5, 7) if name == "manifest.json" else (place % 8,):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                verify_checkpoint(folder)
    path.write_bytes(data)
    verify_checkpoint(folder)


def test_every_bit_of_the_manifest_counts(folder: Path) -> None:
    path = folder / "manifest.json"
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                verify_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["truncated", "missing", "empty", "link", "folder"])
def test_damage_is_named(folder: Path, tmp_path: Path, name: str, fault: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(data[:-1])
    elif fault == "empty":
        path.touch()
    elif fault == "link":
        if name == "manifest.json":
            pytest.skip("a linked manifest still fixes every byte of the checkpoint")
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    elif fault == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError, match=r"damaged|altered|no manifest|missing") as told:
        read_checkpoint(folder)
    assert str(folder) in str(told.value)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "null",
        "{}",
        '{"format": 1}',
        '{"files": {}, "format": 1}',
        '{"files": 3, "format": 1}',
    ],
)
def test_manifests_of_another_shape_are_refused(folder: Path, manifest: str) -> None:
    (folder / "manifest.json").write_text(to_json(json.loads(manifest)))
    with pytest.raises(CheckpointError, match="damaged"):
        verify_checkpoint(folder)


def test_a_manifest_cannot_name_files_elsewhere(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(to_json(manifest))
    with pytest.raises(CheckpointError, match="altered"):
        verify_checkpoint(folder)


def test_a_state_that_was_added_is_refused(folder: Path) -> None:
    state = (folder / "trainer.pt").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]["trainer.pt"]
    (folder / "trainer.pt").unlink()
    (folder / "manifest.json").write_text(to_json(manifest))
    verify_checkpoint(folder)
    (folder / "trainer.pt").write_bytes(state)
    with pytest.raises(CheckpointError, match=r"trainer.pt was added: it is not in the manifest"):
        read_checkpoint(folder)


def test_a_newer_format_is_refused_with_the_way_out(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(to_json({**manifest, "format": FORMAT + 1}))
    with pytest.raises(CheckpointError, match=r"format 2, this modern_llm reads up to 1.*upgrade"):
        read_checkpoint(folder)


def test_no_checkpoint_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a checkpoint: it has no manifest"):
        read_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="not a checkpoint: it has no manifest"):
        read_checkpoint(tmp_path / "nothing")


class Payload:
    """Pickled, it writes the canary when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".safetensors"])
def test_a_pickle_is_refused_and_not_executed(tmp_path: Path, suffix: str) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match="can run code and are never loaded"):
        read_checkpoint(path)
    assert not canary.exists()


@pytest.mark.parametrize("writer", ["pickle", "torch", "legacy"])
@pytest.mark.parametrize("name", ["trainer.pt", "model.safetensors"])
def test_code_inside_a_checkpoint_with_a_right_manifest_is_not_executed(
    folder: Path, tmp_path: Path, writer: str, name: str
) -> None:
    canary, path = tmp_path / "canary", folder / name
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"step": Payload(canary)}))
    else:
        new = writer == "torch"
        torch.save({"step": Payload(canary)}, path, _use_new_zipfile_serialization=new)
    path.chmod(0o640)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / "manifest.json").write_text(to_json(manifest))
    with pytest.raises(CheckpointError, match=r"is refused|cannot be read"):
        read_checkpoint(folder).trainer_state()
    assert not canary.exists()


def test_trainer_state_that_others_could_have_written_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "trainer.pt"
    assert path.stat().st_mode & 0o777 == 0o640
    assert folder.stat().st_mode & 0o777 == 0o750
    for mode in (0o660, 0o646):
        path.chmod(mode)
        with pytest.raises(CheckpointError, match="other users may write it"):
            read_trainer_state(path)
    path.chmod(0o640)
    (tmp_path / "link.pt").symlink_to(path)
    with pytest.raises(CheckpointError, match="a link"):
        read_trainer_state(tmp_path / "link.pt")
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(CheckpointError, match="another user"):
        read_trainer_state(path)


def test_weights_alone_cannot_be_resumed(tmp_path: Path, make_model: Models) -> None:
    write(tmp_path / "final", make_model(), trainer_state=None)
    assert not (tmp_path / "final" / "trainer.pt").exists()
    with pytest.raises(CheckpointError, match="holds weights only"):
        read_checkpoint(tmp_path / "final").trainer_state()


def test_a_field_that_came_later_is_at_its_default_in_the_checkpoint(
    folder: Path, make_model: Models
) -> None:
    checkpoint = read_checkpoint(folder)
    for name in ("window_pattern", "softcap", "qk_norm"):
        del checkpoint.meta["model"][name]
    load_model_weights(make_model(), checkpoint)
    capped = make_model(softcap=5.0)  # has the same tensors
    with pytest.raises(CheckpointError, match=r"model.softcap is None there and 5.0 here"):
        load_model_weights(capped, checkpoint)


def test_another_architecture_lists_fields_and_tensors(folder: Path, make_model: Models) -> None:
    checkpoint = read_checkpoint(folder)
    with pytest.raises(CheckpointError) as told:
        load_model_weights(make_model(d_ff=48, n_layers=1, position="learned"), checkpoint)
    for part in ("model.n_layers is 2 there and 1 here", "model.d_ff", "has no place", "and "):
        assert part in str(told.value)
    with pytest.raises(CheckpointError, match=r"model.vocab_size is 32 there and 40 here"):
        load_model_weights(make_model(vocab_size=40), checkpoint)
    same_shapes = make_model(n_heads=1)  # nothing but the config tells them apart
    with pytest.raises(CheckpointError, match=r"model.n_heads is 2 there and 1 here"):
        load_model_weights(same_shapes, checkpoint)
    with pytest.raises(CheckpointError, match=r"torch.float32, the model has"):
        load_model_weights(make_model().half(), checkpoint)
    load_model_weights(make_model(dropout=0.0, attention_backend="manual"), checkpoint)


def test_a_refused_load_changes_nothing(folder: Path, make_model: Models) -> None:
    model = make_model(vocab_size=40)
    before = {name: tensor.clone() for name, tensor in model_weights(model).items()}
    with pytest.raises(CheckpointError):
        load_model_weights(model, read_checkpoint(folder))
    assert all(torch.equal(t, before[name]) for name, t in model_weights(model).items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_published(
    tmp_path: Path, make_model: Models, value: float
) -> None:
    model = make_model()
    with torch.no_grad():
        model.embedding.weight[3, 1] = value
    with pytest.raises(DivergedError, match=r"weight 'embedding.weight' is not finite"):
        write(tmp_path / "c", model)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_never_written_over(folder: Path, make_model: Models) -> None:
    before = {f.name: sha256_file(f) for f in folder.iterdir()}
    with pytest.raises(ProtectedPathError, match="exists"):
        write(folder, make_model())
    assert {f.name: sha256_file(f) for f in folder.iterdir()} == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("torn")])
def test_a_failed_write_leaves_nothing_and_tells_path_and_bytes(
    tmp_path: Path, make_model: Models, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ProtectedPathError, match=r"step-00000009: it needs about \d+ bytes, \d+"):
        write(tmp_path / "step-00000009", make_model())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB."""
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small disk needs root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("part", ["weights", "state"])
def test_full_disk_leaves_the_last_checkpoint(
    small_disk: Path, make_model: Models, part: str
) -> None:
    first = small_disk / "step-00000001"
    write(first, make_model())
    big = torch.zeros(200_000)
    changes = {"weights": {"w": big}} if part == "weights" else {"trainer_state": {"m": big}}
    with pytest.raises(ProtectedPathError, match=r"step-00000002: it needs about 8\d{5} bytes"):
        write(small_disk / "step-00000002", make_model(), **changes)
    assert [f.name for f in small_disk.iterdir()] == ["step-00000001"]
    verify_checkpoint(first)
    shutil.rmtree(first)
