"""The command line: ``modern-llm COMMAND`` and the scripts, which call the same functions.

Heavy libraries are imported inside the commands, so that ``--help`` and a refused config answer
at once. Exit codes are those of `modern_llm.errors`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modern_llm import __version__
from modern_llm.cli import experiments, listing, models, pipeline, sinks
from modern_llm.errors import ModernLLMError, PeerError
from modern_llm.registry import load_plugin

EXIT_CODES = """exit codes:
  0 done   1 'verify' found problems, a study has no result, or a bug with its traceback
  2 config   3 data   4 checkpoint   5 diverged   6 protected or unwritable path
  7 another rank died or did not answer
  75 stopped by a signal after saving: the same command (without --force) goes on
  130 interrupted"""


@dataclass(frozen=True)
class Command:
    """One command: what it says of itself, its flags, and what it does."""

    summary: str
    arguments: Callable[[argparse.ArgumentParser], None]
    execute: Callable[[argparse.Namespace], int]
    takes_flags: bool = False  # those of other projects: what the parser does not know is kept


COMMANDS = {
    "run": Command("run one stage or all of them", pipeline.stage_arguments, pipeline.run),
    "speedrun": Command(
        "run the whole pipeline, from nothing to the report", pipeline.run_arguments, pipeline.run
    ),
    "train": Command(
        "pretrain alone, with the flags of other projects (--n_embd=384)",
        pipeline.train_arguments,
        pipeline.train,
        takes_flags=True,
    ),
    "eval": Command(
        "evaluate the stages of a run, or one checkpoint",
        pipeline.eval_arguments,
        pipeline.run,
    ),
    "compare": Command(
        "evaluate checkpoints side by side", pipeline.compare_arguments, pipeline.compare
    ),
    "report": Command(
        "rebuild the report of a run from its files", pipeline.report_arguments, pipeline.report
    ),
    "verify": Command("check the record of a run", pipeline.verify_arguments, pipeline.verify),
    "plan": Command(
        "check a config and print what it takes", pipeline.plan_arguments, pipeline.run
    ),
    "generate": Command(
        "answer prompts, or continue texts", models.generate_arguments, models.generate
    ),
    "chat": Command("talk with a checkpoint", models.session_arguments, models.chat),
    "inference": Command(
        "show what a checkpoint is, samples of it, and go on with what is typed",
        models.inference_arguments,
        models.inference,
    ),
    "export": Command(
        "write a checkpoint for transformers", models.export_arguments, models.export
    ),
    "experiment-sinks": Command(
        "losses beyond the context with windows and attention sinks", sinks.arguments, sinks.run
    ),
    "prepare-data": Command(
        "fetch and tokenize the data of a config ahead, or check that it is there",
        pipeline.prepare_arguments,
        pipeline.prepare,
    ),
    "experiment": Command(
        "train the arms of a study and compare them", experiments.study_arguments, experiments.study
    ),
    "compare-architectures": Command(
        "compare results of experiments", experiments.compare_arguments, experiments.compare
    ),
    "presets": Command("list the presets", listing.no_arguments, listing.presets),
    "schema": Command("print the JSON Schema of configs", listing.no_arguments, listing.schema),
}


def _guarded(execute: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; a user's mistake is one message and its exit code, a bug a traceback.

    Of several ranks one tells: the first that failed, or rank 0 what all of them see.
    """
    tells, code, reason = _is_first(), 0, "done"
    try:
        code = execute(args)
    except ModernLLMError as error:
        tells = tells if error.told is None else not error.told
        code, reason = error.exit_code, str(error)
        if tells:
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code, reason = 130, "interrupted"
        told = "interrupted; the same command goes on from what was saved (without --force)"
        print(told, file=sys.stderr)
    except BrokenPipeError:  # the reader of our output, such as head, is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = Path(os.environ.get("MODERN_LLM_STATUS_FILE", ""))
    late = code == PeerError.exit_code and status.exists()  # a rank that failed has told why
    if tells and status.name and not late:
        from modern_llm.runtime.artifacts import write_status

        write_status(status, {"exit_code": code, "reason": reason})
    return code


def _is_first() -> bool:
    """Whether this process is the first of those that its launcher started."""
    names = ["RANK"]
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        names.append("SLURM_PROCID")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        names.append("LOCAL_RANK")  # a launcher that forgot the other
    return next((os.environ[name] for name in names if os.environ.get(name)), "0") == "0"


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
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each rank would print its warnings

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
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:<{width}} {entry.summary}" for name, entry in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="modern-llm", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a small language model: pretrain, SFT, DPO, verifier, eval, report.",
        epilog=f"commands (each has --help):\n{listing}\n\n{EXIT_CODES}",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"modern_llm {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    parser.parse_args(argv)
    return 0
