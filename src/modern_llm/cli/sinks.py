"""The command of the study of attention sinks."""

import argparse
import json
import shlex
from pathlib import Path

from modern_llm.cli.arguments import add_place, add_policy, config_of
from modern_llm.config import PipelineConfig
from modern_llm.errors import ConfigError

MODES = {"demo": (1, 64), "full": (3, 128)}  # seeds, texts at most
LOCAL_TEXT = "tinyshakespeare"  # the demo's, where it is there; else generated text


def arguments(parser: argparse.ArgumentParser) -> None:
    """Mode, models, length and sinks."""
    parser.add_argument(
        "--mode", default="demo", choices=MODES,
        help="demo: small and quick (preset sinks-demo); full: larger, 3 seeds (sinks-full)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoints", nargs="+", type=Path, default=[], metavar="PATH",
        help="read these models and train none; those of one kind count as its seeds",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, help="models of each kind (demo: 1, full: 3)")
    parser.add_argument("--contexts", type=int, default=8, help="length of the texts in contexts")
    parser.add_argument("--n-sinks", type=int, default=4, help="first tokens that sinks keep")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value",
        help="change any field of the preset, such as model.window=32",
    )  # fmt: skip
    add_place(parser)
    add_policy(parser)


def run(args: argparse.Namespace) -> int:
    """Run the study and write its report."""
    # argparse gives --checkpoints all that follows it, overrides too.
    folders = [path for path in args.checkpoints if "=" not in str(path) or path.exists()]
    args.overrides += [str(path) for path in args.checkpoints if path not in folders]
    if folders and args.seeds is not None:
        raise ConfigError("--seeds has no effect with --checkpoints, which name every model")
    seeds, n_texts = MODES[args.mode]
    config = _config(args)
    count = seeds if args.seeds is None else args.seeds
    from modern_llm.experiments.sinks.study import Study, run_study

    study = Study(
        config, args.contexts, args.n_sinks, n_texts,
        tuple(range(config.seed, config.seed + count)), tuple(folders), tuple(args.plugin),
        shlex.join(["modern-llm", *args.command]), args.on_exists,
    )  # fmt: skip
    from modern_llm.runtime.signals import stop_at_once

    with stop_at_once():
        written = run_study(study)
        if written is None:
            print(f"{study.folder / 'result.json'} exists; left as it is")
        else:
            print("result: {}\nreport: {}".format(*written))
    return 0


def _config(args: argparse.Namespace) -> PipelineConfig:
    """The mode's preset with the overrides; the demo reads real text where it is at hand."""
    args.config = f"sinks-{args.mode}"
    config = config_of(args)
    given = any(item.startswith("pretrain.data=") for item in args.overrides)
    if args.mode == "demo" and not given:
        from modern_llm.data.lookup import find_local

        if find_local(config.data, f"{LOCAL_TEXT}/input.txt"):
            args.overrides = [f"pretrain.data={json.dumps([LOCAL_TEXT])}", *args.overrides]
            config = config_of(args)
    return config
