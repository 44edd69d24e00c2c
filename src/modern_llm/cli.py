"""The command line: ``modern-llm COMMAND`` and the scripts, which call the same functions.

Heavy libraries are imported inside the commands, so that ``--help`` and a refused config answer
at once. Exit codes are those of `modern_llm.errors`.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modern_llm import __version__
from modern_llm.config import STAGES, PipelineConfig, json_schema, list_presets, load_config
from modern_llm.errors import ConfigError, ModernLLMError
from modern_llm.registry import load_plugin
from modern_llm.runtime.artifacts import Policy, sha256_file
from modern_llm.runtime.signals import stop_at_once

EXIT_CODES = """exit codes:
  0 done   1 'verify' found problems, or a bug with its traceback   2 config   3 data
  4 checkpoint   5 diverged   6 protected or unwritable path
  75 stopped by a signal after saving: the same command (without --force) goes on
  130 interrupted"""


def _add_config(parser: argparse.ArgumentParser, *, named: bool = True) -> None:
    what = f"preset ({', '.join(list_presets())}) or a .json or .yaml file"
    if named:
        parser.add_argument("--config", default="local-smoke", metavar="NAME|PATH", help=what)
    else:
        parser.add_argument("config", metavar="CONFIG", help=what)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value",
        help="change any field of the config, such as training.lr=3e-4",
    )  # fmt: skip


def _add_policy(parser: argparse.ArgumentParser) -> None:
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


def _config(args: argparse.Namespace) -> PipelineConfig:
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


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", type=Path, help="write everything below this folder")
    parser.add_argument("--run-name", help="name of what is written")


def _run_arguments(parser: argparse.ArgumentParser, *, named: bool = True) -> None:
    _add_config(parser, named=named)
    _add_place(parser)
    parser.add_argument("--max-steps", type=int, help="cap each trained stage (smoke runs)")
    parser.add_argument("--resume", action="store_true", help="go on with a run, or refuse")
    parser.add_argument(
        "--allow-data-change", action="store_true", help="go on although the data changed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )
    _add_policy(parser)


def _stage_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--stage", default="all", choices=[*STAGES, "all"])
    parser.add_argument("--checkpoint", type=Path, help="start here, not from the stage before")


def _run(args: argparse.Namespace) -> int:
    config = _config(args)
    from modern_llm.alignment.pipeline import AlignmentPipeline

    stage, checkpoint = getattr(args, "stage", "all"), getattr(args, "checkpoint", None)
    if checkpoint is not None and stage == "all":
        raise ConfigError("--checkpoint needs --stage: which stage is to start from it?")
    origin = {"preset": args.config, "command": shlex.join(["modern-llm", *args.command])}
    pipeline = AlignmentPipeline(
        config, origin=origin, on_exists=args.on_exists, resume=args.resume,
        allow_data_change=args.allow_data_change,
    )  # fmt: skip
    if args.dry_run:
        from modern_llm.alignment.plan import print_plan

        return print_plan(config, pipeline.preflight(stage, checkpoint=checkpoint))
    with stop_at_once():
        outcome = pipeline.run(stage, checkpoint=checkpoint)
        if outcome is not None:
            _conclude(outcome.run, config, changed=bool(outcome.ran), on_exists=args.on_exists)
    return 0


def _train(args: argparse.Namespace) -> int:
    from modern_llm.experiments.train_flags import translate

    args.overrides += translate(args.flags)
    return _run(args)


def _conclude(run: Path, config: PipelineConfig, *, changed: bool, on_exists: Policy) -> None:
    """Write report and ledger, unless the newest report tells all that there is; show both."""
    from modern_llm.reporting.console import print_summary
    from modern_llm.reporting.ledger import record_scores
    from modern_llm.reporting.report import is_current, newest_report, write_report

    path = newest_report(run, config.paths.report)
    if changed or path is None or not is_current(path, run):
        path = write_report(run, config.paths.report, on_exists=on_exists) or path
    record_scores(run, config.paths.ledger)  # each once, also after a stop before this line
    print_summary(run)
    print(f"run:    {run}\nreport: {path or 'none'}")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser, named=False)
    parser.set_defaults(stage="pretrain")


def _eval_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, help="evaluate this one only")
    parser.set_defaults(stage="eval")


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _stage_arguments(parser)
    parser.set_defaults(dry_run=True)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_place(parser)
    _add_policy(parser)
    parser.add_argument(
        "--checkpoints", nargs="+", type=Path, required=True, metavar="PATH",
        help="checkpoint folders; the first is what the others are compared with",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", action="append", default=[], metavar="NAME|PATH",
        help="a transformers model beside them, such as gpt2 or a local folder",
    )  # fmt: skip


def _compare(args: argparse.Namespace) -> int:
    # argparse gives --checkpoints all that follows it, overrides too.
    folders = [path for path in args.checkpoints if "=" not in str(path) or path.exists()]
    args.overrides += [str(path) for path in args.checkpoints if path not in folders]
    config = _config(args)
    from modern_llm.alignment.comparison import compare_checkpoints, comparison_path

    written = compare_checkpoints(
        config, folders, baselines=args.baseline, on_exists=args.on_exists
    )
    print(f"result: {written}" if written else f"{comparison_path(config)} exists; left as it is")
    return 0


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder, such as experiments/runs/local-smoke")
    parser.add_argument("--report-dir", type=Path, default=Path("report"))
    _add_policy(parser)


def _report(args: argparse.Namespace) -> int:
    from modern_llm.reporting.report import report_path, write_report

    written = write_report(args.run, args.report_dir, on_exists=args.on_exists)
    print(written or f"{report_path(args.run, args.report_dir)} exists; left as it is")
    return 0


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run folder")


def _verify(args: argparse.Namespace) -> int:
    from modern_llm.reporting.record import check_run

    problems = check_run(args.run)
    for problem in problems:
        print(problem)
    print(f"{args.run}: {len(problems)} problems")
    return 1 if problems else 0


def _session_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--max-new-tokens", type=int, default=None)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0: off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _session_arguments(parser)
    parser.add_argument(
        "--plain", action="store_true",
        help="continue the text as it is, without the markers of a chat (after pretraining)",
    )  # fmt: skip
    parser.add_argument("prompts", nargs="+", help="one answer to each")


def _generate(args: argparse.Namespace) -> int:
    from modern_llm.inference.session import Sampler, load_model

    session = load_model(args.checkpoint, device=args.device)
    sampler = Sampler(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    for reply in session.complete(args.prompts, sampler=sampler, plain=args.plain):
        print(reply.text)
    return 0


def _chat(args: argparse.Namespace) -> int:
    from modern_llm.inference.chat import chat
    from modern_llm.inference.session import Sampler, load_model

    sampler = Sampler(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    chat(load_model(args.checkpoint, device=args.device), sampler=sampler)
    return 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder of a policy")
    parser.add_argument("target", type=Path, help="folder to write")
    _add_policy(parser)


def _export(args: argparse.Namespace) -> int:
    from modern_llm.interop.transformers_export import export_transformers

    done = export_transformers(args.checkpoint, args.target, on_exists=args.on_exists)
    if done is None:
        print(f"{args.target} exists; left as it is")
    else:
        print(
            f"{done.folder}: {done.architecture}; logits differ by at most "
            f"{done.max_difference:.1e} when transformers reads it back"
        )
    return 0


def _prepare(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.overrides)
    from modern_llm.alignment.preparation import prepare_data

    prepare_data(config)
    return 0


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes nothing."""


def _presets(args: argparse.Namespace) -> int:
    for name in list_presets():
        print(f"{name:<14} {load_config(name).description}")
    return 0


def _schema(args: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=2, sort_keys=True))
    return 0


@dataclass(frozen=True)
class Command:
    """One command: what it says of itself, its flags, and what it does."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[argparse.Namespace], int]
    takes_flags: bool = False  # those of other projects: what the parser does not know is kept


COMMANDS = {
    "run": Command("run one stage or all of them", _stage_arguments, _run),
    "speedrun": Command("run the whole pipeline, from nothing to the report", _run_arguments, _run),
    "train": Command(
        "pretrain alone, with the flags of other projects (--n_embd=384)",
        _train_arguments,
        _train,
        takes_flags=True,
    ),
    "eval": Command("evaluate the stages of a run, or one checkpoint", _eval_arguments, _run),
    "compare": Command("evaluate checkpoints side by side", _compare_arguments, _compare),
    "report": Command("rebuild the report of a run from its files", _report_arguments, _report),
    "verify": Command("check the record of a run", _verify_arguments, _verify),
    "plan": Command("check a config and print what it takes", _plan_arguments, _run),
    "generate": Command("answer prompts, or continue texts", _generate_arguments, _generate),
    "chat": Command("talk with a checkpoint", _session_arguments, _chat),
    "export": Command("write a checkpoint for transformers", _export_arguments, _export),
    "prepare-data": Command("tokenize the data of a config ahead", _add_config, _prepare),
    "presets": Command("list the presets", _no_arguments, _presets),
    "schema": Command("print the JSON Schema of configs", _no_arguments, _schema),
}


def _guarded(execute: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; a user's mistake is one message and its exit code, a bug a traceback."""
    try:
        return execute(args)
    except ModernLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        told = "interrupted; the same command goes on from what was saved (without --force)"
        print(told, file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as head, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parser_of(command: str, *, prog: str | None = None) -> argparse.ArgumentParser:
    """Parser of one command's flags."""
    entry = COMMANDS[command]
    parser = argparse.ArgumentParser(
        prog=prog, description=entry.summary, epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    entry.arguments(parser)
    parser.add_argument(
        "--plugin", type=Path, action="append", default=[], metavar="FILE",
        help="a Python file that registers components of your own (it is run)",
    )  # fmt: skip
    return parser


def script(command: str, argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run one command as a script of its own."""
    entry, parser = COMMANDS[command], parser_of(command, prog=prog)
    argv = sys.argv[1:] if argv is None else argv
    args, flags = parser.parse_known_intermixed_args(argv)
    if flags and not entry.takes_flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    args.flags, args.command = flags, [command, *argv]
    # Threads that spin while they wait make small steps many times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

    def execute(args: argparse.Namespace) -> int:
        for plugin in args.plugin:
            print(f"plugin {plugin}: {', '.join(load_plugin(plugin))}", file=sys.stderr)
        return entry.execute(args)

    return _guarded(execute, args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``modern-llm``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        return script(argv[0], argv[1:], prog=f"modern-llm {argv[0]}")
    listing = "\n".join(f"  {name:<14} {entry.summary}" for name, entry in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="modern-llm", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a small language model: pretrain, SFT, DPO, verifier, eval, report.",
        epilog=f"commands (each has --help):\n{listing}\n\n{EXIT_CODES}",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"modern_llm {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.parse_args(argv)
    return 0
