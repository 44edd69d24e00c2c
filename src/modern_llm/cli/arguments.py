"""Flags that several commands share, and the config that they come to."""

import argparse
import json
from pathlib import Path

from modern_llm.config import PipelineConfig, list_presets, load_config
from modern_llm.errors import ConfigError
from modern_llm.runtime.artifacts import sha256_file


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


def config_of(args: argparse.Namespace) -> PipelineConfig:
    """Config of the flags: a flag becomes an override, so that one rule serves both."""
    max_steps = getattr(args, "max_steps", None)  # where nothing is trained, there is no such flag
    own: dict[str, object] = {"name": args.run_name, "max_steps": max_steps}
    if args.output_dir is not None:
        out: Path = args.output_dir
        own |= {"paths.output": out, "paths.report": out / "report"}
        own["paths.ledger"] = out / "ledger.jsonl"
    if args.plugin:
        own["plugins"] = {path.name: sha256_file(path) for path in args.plugin}
    flags = [f"{key}={json.dumps(v, default=str)}" for key, v in own.items() if v is not None]
    config = load_config(args.config, [*args.overrides, *flags])
    if config.plugins and not args.plugin:
        names = " ".join(f"--plugin PATH/TO/{name}" for name in config.plugins)
        raise ConfigError(f"{args.config} was made with components from elsewhere: give {names}")
    return config
