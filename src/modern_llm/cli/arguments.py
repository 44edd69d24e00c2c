"""Flags that several commands share, and the config that they come to."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from modern_llm.config import PipelineConfig, list_presets, load_config
from modern_llm.config.loading import Rewrite
from modern_llm.errors import ConfigError
from modern_llm.runtime.artifacts import sha256_file

# SLURM's formats: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.
DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?")
NO_DAYS = re.compile(r"(?:(\d+):)??(\d+)(?::(\d+))?")
NO_LIMIT = ("UNLIMITED", "INFINITE")
CHECKPOINT_HELP = "folder of a checkpoint, or of a stage or run: its last good one"


def add_config(parser: argparse.ArgumentParser, *, named: bool = True) -> None:
    """Config by preset or path, and its overrides; ``named``: by ``--config``."""
    what = f"preset ({', '.join(list_presets())}) or a .json or .yaml file"
    if named:
        parser.add_argument("--config", default="local-smoke", metavar="NAME|PATH", help=what)
    else:
        parser.add_argument("config", metavar="CONFIG", help=what)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value",
        help="change any field of the config, such as training.lr=3e-4",
    )  # fmt: skip


def add_policy(parser: argparse.ArgumentParser) -> None:
    """What to do with results that exist."""
    exists = parser.add_mutually_exclusive_group()
    exists.add_argument(
        "--no-overwrite", dest="on_exists", action="store_const", const="skip",
        help="leave what exists and do nothing in its place",
    )  # fmt: skip
    exists.add_argument(
        "--force", dest="on_exists", action="store_const", const="replace",
        help="replace what exists; a backup is kept",
    )  # fmt: skip
    parser.set_defaults(on_exists="timestamp")


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where results go."""
    parser.add_argument("--output-dir", type=Path, help="write everything below this folder")
    parser.add_argument("--run-name", help="name of what is written")


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number from 1 on")
    return int(text)


def duration_s(text: str) -> float:
    """Seconds of a time limit as SLURM writes it: ``30`` (minutes), ``12:00:00``, ``2-06:30``."""
    if text.upper() in NO_LIMIT:
        return float("inf")
    if found := DAYS.fullmatch(text):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    elif found := NO_DAYS.fullmatch(text):
        days = 0
        hours, minutes, seconds = (int(part or 0) for part in found.groups())
    else:
        raise argparse.ArgumentTypeError(f"{text!r}: write [D-]HH:MM:SS, or minutes")
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def config_of(args: argparse.Namespace, *, rewrite: Rewrite | None = None) -> PipelineConfig:
    """Config of the flags: a flag becomes an override, so that one rule serves both.

    Args:
        args: flags of the command.
        rewrite: see `load_config`.
    """
    max_steps = getattr(args, "max_steps", None)  # where nothing is trained, there is no such flag
    own: dict[str, object] = {"name": args.run_name, "max_steps": max_steps}
    if args.output_dir is not None:
        out: Path = args.output_dir
        own |= {"paths.output": out, "paths.report": out / "report"}
        own["paths.ledger"] = out / "ledger.jsonl"
    flags = [f"{key}={json.dumps(v, default=str)}" for key, v in own.items() if v is not None]
    config = load_config(args.config, [*args.overrides, *flags], rewrite=rewrite)
    check_plugins(config.plugins, args.plugin, made=args.config)
    return config.model_copy(update={"plugins": _hashes(args.plugin)}) if args.plugin else config


def _hashes(plugins: Sequence[Path]) -> dict[str, str]:
    """File name -> sha256."""
    return {path.name: sha256_file(path) for path in plugins}


def check_plugins(wanted: Mapping[str, str], given: Sequence[Path], *, made: object) -> None:
    """Refuse what was made with plugins when they are not given, or are not what they were.

    Args:
        wanted: file name -> sha256 of those that it was made with.
        given: files of ``--plugin``.
        made: what was made with them, as the user is told.

    Raises:
        ConfigError: a plugin is missing or differs; names all of them.
    """
    found = _hashes(given)
    problems = [
        f"{made} was made with components from elsewhere: give --plugin PATH/TO/{name}"
        if name not in found
        else f"{made} was made with another {name}: its sha256 was {sha256[:12]}, that of the file "
        f"given is {found[name][:12]}; give the one that it was made with"
        for name, sha256 in wanted.items()
        if found.get(name) != sha256
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def checkpoint_of(path: Path, args: argparse.Namespace, *, stage: str | None = None) -> Path:
    """The checkpoint that a path on the command line means, whose plugins are those given.

    Args:
        path: folder of a checkpoint, a stage or a run.
        args: flags of the command.
        stage: what is to start from it; of a run then a stage before.

    Raises:
        CheckpointError: a stage or run without a good checkpoint.
        ConfigError: see `check_plugins`.
    """
    from modern_llm.inference.locate import POLICIES, locate_checkpoint, plugins_of

    until = POLICIES.index(stage) if stage in POLICIES else len(POLICIES)
    found = locate_checkpoint(path, stages=POLICIES[: max(1, until)])
    check_plugins(plugins_of(found), args.plugin, made=found)
    return found
