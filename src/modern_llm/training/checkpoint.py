"""Checkpoints: a folder that is whole or not there, hashed, and never executes what it holds.

A folder holds ``model.safetensors``, ``config.json`` (what it is and what it came from),
``tokenizer.json``, ``trainer.pt`` (optimizer, random state, position; plain values and tensors
only) and ``manifest.json`` (size and sha256 of each file), written last. One rename publishes it.
"""

import json
import os
import pickle
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modern_llm.errors import CheckpointError, DivergedError, ProtectedPathError
from modern_llm.models.weights import copy_weights
from modern_llm.runtime.artifacts import (
    published_folder,
    sha256_file,
    to_json,
    write_text,
)
from modern_llm.training.records import WAY_OUT

FORMAT = 1  # of the folder; a reader refuses a newer one
WEIGHTS, META, TOKENIZER, STATE, MANIFEST = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "trainer.pt",
    "manifest.json",
)
REQUIRED = (WEIGHTS, META, TOKENIZER)
# Fields of a model config that may change between stages: the weights mean the same.
FREE_FIELDS = ("dropout", "attention_backend", "init_std", "max_seq_len")


class DamagedCheckpointError(CheckpointError):
    """What is there is known to be torn or altered: an older one may be taken in its place."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: where it lies.
        weights: tensors by name, on the CPU; tied tensors once.
        meta: content of ``config.json``.
        tokenizer_path: its ``tokenizer.json``.
        sha256: of its manifest, which fixes every byte of it.
    """

    folder: Path
    weights: dict[str, Tensor]
    meta: dict[str, Any]
    tokenizer_path: Path
    sha256: str

    def trainer_state(self) -> dict[str, Any]:
        """Optimizer, random state and position; see `read_trainer_state`."""
        return read_trainer_state(self.folder / STATE)


def write_checkpoint(
    target: Path,
    *,
    weights: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    tokenizer_json: str,
    trainer_state: Mapping[str, Any] | None,
) -> str:
    """Write ``target`` whole or not at all.

    Args:
        target: folder to make.
        weights: tensors by name; see `model_weights`.
        meta: step, stage, model config, hashes of tokenizer, template, parent and data.
        tokenizer_json: content of ``tokenizer.json``.
        trainer_state: tensors and plain values, or ``None`` for weights alone.

    Returns:
        sha256 of the manifest.

    Raises:
        DivergedError: a weight is not finite; nothing is written.
        ProtectedPathError: ``target`` exists, or the disk refuses; nothing is left behind.
    """
    check_finite(weights, target)
    needed = sum(t.numel() * t.element_size() for t in weights.values()) + _bytes(trainer_state)
    try:
        with published_folder(target) as staging:
            staging.chmod(0o750)
            tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
            save_file(tensors, staging / WEIGHTS)
            write_text(staging / META, to_json({**meta, "format": FORMAT}))
            write_text(staging / TOKENIZER, tokenizer_json)
            if trainer_state is not None:
                torch.save(dict(trainer_state), staging / STATE)
            files = {}
            for file in sorted(staging.iterdir()):
                file.chmod(0o640)
                files[file.name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
            write_text(staging / MANIFEST, to_json({"format": FORMAT, "files": files}))
            (staging / MANIFEST).chmod(0o640)
            digest = sha256_file(staging / MANIFEST)
    except (OSError, RuntimeError, SafetensorError, ProtectedPathError) as error:
        if target.exists():
            raise
        raise ProtectedPathError(
            f"cannot write checkpoint {target}: it needs about {needed} bytes, "
            f"{_free_bytes(target.parent)} are free ({str(error).splitlines()[0]}); "
            "free space or choose another output, then start again: the run goes on"
        ) from error
    return digest


def check_finite(weights: Mapping[str, Tensor], target: Path) -> None:
    """Refuse weights that are not finite.

    Raises:
        DivergedError: names the first such weight, and ``target``, which is not to be written.
    """
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise DivergedError(f"{target} is not saved: weight '{name}' is not finite; {WAY_OUT}")


def _bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """Check every byte of a checkpoint and return its manifest.

    Raises:
        DamagedCheckpointError: names the file and its fault: missing, truncated, altered, a link,
            or not of the manifest.
        CheckpointError: of a newer format, or the disk or its rights refuse to read it.
    """
    try:
        if folder.is_file():
            raise CheckpointError(
                f"{folder} is a file; a checkpoint is a folder with {MANIFEST}. Pickled weights "
                "(.pt, .bin) can run code and are never loaded: convert them to safetensors"
            )
        manifest = _read_manifest(folder)
        for name, facts in manifest["files"].items():
            _check_file(folder / name, facts)
        if STATE not in manifest["files"] and (folder / STATE).exists():
            raise DamagedCheckpointError(f"{folder / STATE} was added: it is not in the manifest")
    except FileNotFoundError as error:  # removed since it was seen
        raise DamagedCheckpointError(f"{error.filename} is missing") from None
    except OSError as error:
        raise _unreadable(folder, error) from error
    return manifest


def _unreadable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{folder} cannot be read ({error}), so nothing is known of it; "
        "make it readable or move it away, then start again"
    )


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    """Compare one file with its entry in the manifest."""
    if path.is_symlink() or not path.is_file():
        raise DamagedCheckpointError(f"{path} is missing or not a file; the checkpoint is damaged")
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise DamagedCheckpointError(
            f"{path} has {size} bytes, its manifest says {facts['bytes']}; "
            "the checkpoint is damaged"
        )
    if sha256_file(path) != facts["sha256"]:
        raise DamagedCheckpointError(f"{path} was altered (sha256 differs from its manifest)")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Parse and check the manifest itself; any single altered bit of it is refused."""
    path = folder / MANIFEST
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text)
        version = manifest["format"]
        if isinstance(version, int) and version > FORMAT:
            raise CheckpointError(
                f"{folder} has checkpoint format {version}, this modern_llm reads up to {FORMAT}; "
                "it was written by a newer version: upgrade, or choose another checkpoint"
            )
        files = manifest["files"]
        sound = (
            version == FORMAT
            and set(manifest) == {"format", "files"}
            and all(set(facts) == {"bytes", "sha256"} for facts in files.values())
            and all(name in files for name in REQUIRED)
            and all(name == Path(name).name for name in files)
            and text == to_json(manifest)
        )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedCheckpointError(
            f"{folder} is not a checkpoint: it has no {MANIFEST}"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error}); it is damaged") from None
    if not sound:
        raise DamagedCheckpointError(f"{path} was altered; the checkpoint is damaged")
    return dict(manifest)


def read_checkpoint(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Verify a checkpoint and read its weights and its description; runs no code from it.

    Args:
        folder: of the checkpoint.
        verify: ``False`` where `verify_checkpoint` was called just now, be it by another rank.

    Raises:
        CheckpointError: see `verify_checkpoint`.
    """
    if verify:
        verify_checkpoint(folder)
    try:
        weights = load_file(folder / WEIGHTS, device="cpu")
        meta = json.loads((folder / META).read_text())
        digest = sha256_file(folder / MANIFEST)
    except OSError as error:
        raise _unreadable(folder, error) from error
    except (ValueError, SafetensorError) as error:
        raise DamagedCheckpointError(f"{folder} cannot be read: {error}") from error
    return Checkpoint(folder, weights, meta, folder / TOKENIZER, digest)


def read_trainer_state(path: Path) -> dict[str, Any]:
    """Read ``trainer.pt`` of an own checkpoint, tensors and plain values only.

    Raises:
        CheckpointError: there is none; it is a link, of another user, or writable by others; or
            it holds anything but tensors and plain values (which is not executed).
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds weights only; it cannot be resumed") from None
    except OSError as error:
        raise CheckpointError(f"{path} is refused: {error.strerror} (a link?)") from None
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(handle)
        if facts.st_uid != os.geteuid() or not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(f"{path} is refused: it belongs to another user")
        if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise CheckpointError(
                f"{path} is refused: other users may write it (if you trust it: chmod go-w)"
            )
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{path} is refused: it holds more than tensors and plain values ({reason})"
            ) from None


def load_model_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into ``model``; tied tensors stay tied.

    Raises:
        CheckpointError: another architecture; lists the config fields and tensors that differ.
    """
    copy_weights(
        model,
        checkpoint.weights,
        source=str(checkpoint.folder),
        problems=_config_differences(model, checkpoint.meta),
    )


def _config_differences(model: nn.Module, meta: Mapping[str, Any]) -> list[str]:
    """Fields of the model config that differ and change what the weights mean."""
    config, saved = getattr(model, "config", None), meta.get("model")
    if config is None or not isinstance(saved, Mapping):
        return []
    own = config.model_dump(mode="json")
    with suppress(ValueError):  # fields that came later than the checkpoint get their defaults
        saved = type(config).model_validate(saved).model_dump(mode="json")
    return [
        f"model.{name} is {saved.get(name)!r} there and {own.get(name)!r} here"
        for name in sorted({*own, *saved} - set(FREE_FIELDS))
        if _without_coefficient(saved.get(name)) != _without_coefficient(own.get(name))
    ]


def _without_coefficient(value: Any) -> Any:
    """The experts' section without the weight of its balance loss, which may change."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if key != "balance_coef"}
