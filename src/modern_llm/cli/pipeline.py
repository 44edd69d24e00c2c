"""Commands that train, evaluate and report."""

import argparse
import os
import shlex
from pathlib import Path

from modern_llm.cli.arguments import (
    CHECKPOINT_HELP,
    add_config,
    add_place,
    add_policy,
    checkpoint_of,
    config_of,
    count,
    duration_s,
)
from modern_llm.config import PARTS, STAGES, TRAINED_STAGES, PipelineConfig, load_config
from modern_llm.config.loading import Rewrite
from modern_llm.errors import ConfigError
from modern_llm.runtime.artifacts import Policy


def run_arguments(parser: argparse.ArgumentParser, *, named: bool = True) -> None:
    """Config, place and policy of a run; ``named``: see `add_config`."""
    add_config(parser, named=named)
    add_place(parser)
    parser.add_argument("--max-steps", type=int, help="cap each trained stage (smoke runs)")
    parser.add_argument("--resume", action="store_true", help="go on with a run, or refuse")
    parser.add_argument(
        "--allow-data-change", action="store_true", help="go on although the data changed"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan, write nothing"
    )
    parser.add_argument(
        "--elsewhere", action="store_true",
        help="with --dry-run: the run will be on another machine, whose devices are not checked",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", type=count, metavar="N",
        help="with --dry-run: processes that will train together, one a device",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=duration_s, metavar="[D-]HH:MM:SS",
        help="with --dry-run: time that a job has, as SLURM writes it; say if it is too short",
    )  # fmt: skip
    parser.add_argument(
        "--no-report",
        action="store_true",
        help="write neither report nor ledger; 'report' can later",
    )
    add_policy(parser)


def stage_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a run, and which stage."""
    run_arguments(parser)
    parser.add_argument("--stage", default="all", choices=[*STAGES, *PARTS])
    parser.add_argument(
        "--checkpoint", type=Path,
        help=f"start here, not from the stage before: {CHECKPOINT_HELP}",
    )  # fmt: skip


def run(args: argparse.Namespace, *, rewrite: Rewrite | None = None) -> int:
    """Run stages, write report and ledger, show them; ``rewrite``: see `load_config`."""
    config = config_of(args, rewrite=rewrite)
    from modern_llm.alignment.pipeline import AlignmentPipeline
    from modern_llm.runtime.ranks import joined, launched_ranks
    from modern_llm.runtime.signals import stop_at_once

    stage, checkpoint = getattr(args, "stage", "all"), getattr(args, "checkpoint", None)
    if checkpoint is not None and stage == "all":
        raise ConfigError("--checkpoint needs --stage: which stage is to start from it?")
    if checkpoint is not None:
        checkpoint = checkpoint_of(checkpoint, args, stage=PARTS.get(stage, (stage,))[0])
    origin = {"preset": args.config, "command": shlex.join(["modern-llm", *args.command])}
    pipeline = AlignmentPipeline(
        config, origin=origin, on_exists=args.on_exists, resume=args.resume,
        allow_data_change=args.allow_data_change,
    )  # fmt: skip
    if args.dry_run:
        from modern_llm.alignment.plan import machine_of, print_plan

        flags = ("gpu", "gpus", "gpus_per_node", "mfu")  # of `plan` alone
        machine = machine_of(*(getattr(args, flag, None) for flag in flags))
        preflight = pipeline.preflight(
            stage, checkpoint=checkpoint, elsewhere=args.elsewhere or machine is not None,
            ranks=args.ranks,
        )  # fmt: skip
        return print_plan(config, preflight, machine, limit_s=args.time_limit)
    if args.elsewhere or args.ranks is not None or args.time_limit is not None:
        raise ConfigError("--elsewhere, --ranks and --time-limit belong to --dry-run")
    on_gpu = any(config.stage(name).training.device != "cpu" for name in TRAINED_STAGES)
    together = joined(launched_ranks(), timeout_s=config.rank_timeout_s, on_gpu=on_gpu)
    with together as group, stop_at_once():
        if not group.leads:
            pipeline.follow()
            return 0
        with group.leading():
            outcome = pipeline.run(stage, checkpoint=checkpoint)
            if outcome is not None and not args.no_report:
                _conclude(outcome.run, config, changed=bool(outcome.ran), on_exists=args.on_exists)
    return 0


def train(args: argparse.Namespace) -> int:
    """Run one stage with names of other projects, as flags and in a flat file."""
    from modern_llm.config.train_flags import sections, translate

    args.overrides += translate(args.flags)
    return run(args, rewrite=sections)


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


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a run of pretraining alone; its config may be a flat file."""
    run_arguments(parser, named=False)
    parser.set_defaults(stage="pretrain")


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a run of the eval stage alone."""
    run_arguments(parser)
    parser.add_argument(
        "--checkpoint", type=Path, help=f"evaluate this one only: {CHECKPOINT_HELP}"
    )
    parser.set_defaults(stage="eval")


def plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a run that computes nothing, and the machine that it is planned for."""
    stage_arguments(parser)
    parser.add_argument("--gpu", metavar="NAME", help="plan for this card, such as h100, rtx4090")
    parser.add_argument("--gpus", type=int, help="so many of them; default: 1")
    parser.add_argument("--gpus-per-node", type=int, help="of each machine; default: 8")
    parser.add_argument(
        "--mfu", type=float, help="share of the card's peak to count hours with; default: 0.4"
    )
    parser.set_defaults(dry_run=True)


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Config, checkpoints and baselines."""
    add_config(parser)
    add_place(parser)
    add_policy(parser)
    parser.add_argument(
        "--checkpoints", nargs="+", type=Path, required=True, metavar="PATH",
        help="checkpoints, or their stages or runs; the first is what the others are compared with",
    )  # fmt: skip
    parser.add_argument(
        "--baseline", action="append", default=[], metavar="NAME|PATH",
        help="a transformers model beside them, such as gpt2 or a local folder",
    )  # fmt: skip


def compare(args: argparse.Namespace) -> int:
    """Evaluate checkpoints side by side."""
    # argparse gives --checkpoints all that follows it, overrides too.
    folders = [path for path in args.checkpoints if "=" not in str(path) or path.exists()]
    args.overrides += [str(path) for path in args.checkpoints if path not in folders]
    config = config_of(args)
    folders = [checkpoint_of(path, args) for path in folders]
    from modern_llm.alignment.comparison import compare_checkpoints, comparison_path

    written = compare_checkpoints(
        config, folders, baselines=args.baseline, on_exists=args.on_exists
    )
    print(f"result: {written}" if written else f"{comparison_path(config)} exists; left as it is")
    return 0


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Run folder and place."""
    parser.add_argument("run", type=Path, help="run folder, such as experiments/runs/local-smoke")
    parser.add_argument("--report-dir", type=Path, default=Path("report"))
    add_policy(parser)


def report(args: argparse.Namespace) -> int:
    """Rebuild a report."""
    from modern_llm.reporting.report import report_path, write_report

    written = write_report(args.run, args.report_dir, on_exists=args.on_exists)
    print(written or f"{report_path(args.run, args.report_dir)} exists; left as it is")
    return 0


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Run folder."""
    parser.add_argument("run", type=Path, help="run folder")


def verify(args: argparse.Namespace) -> int:
    """Print every problem of a record; exit code 1 when there is one."""
    from modern_llm.reporting.record import check_run

    problems = check_run(args.run)
    for problem in problems:
        print(problem)
    print(f"{args.run}: {len(problems)} problems")
    return 1 if problems else 0


def prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Config, stages, and whether to make or to look."""
    add_config(parser)
    parser.add_argument("--stage", default="all", choices=[*STAGES, "all"])
    parser.add_argument(
        "--jobs", type=int, metavar="N",
        help="processes that encode (default: the processors that this process may use)",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="make nothing: exit code 3 when something is missing or damaged (reads every byte)",
    )  # fmt: skip


def prepare(args: argparse.Namespace) -> int:
    """Fetch and tokenize all data of a config, or look whether it is there."""
    config = load_config(args.config, args.overrides)
    if args.jobs is not None and (args.jobs < 1 or args.check):
        why = "--check has no use for it" if args.check else "at least 1"
        raise ConfigError(f"--jobs {args.jobs}: {why}")
    from modern_llm.alignment.preparation import check_data, prepare_data

    stages = STAGES if args.stage == "all" else (args.stage,)
    if args.check:
        command = [word for word in ("modern-llm", *args.command) if word != "--check"]
        parts = check_data(config, stages, way_out=shlex.join(command))
    else:
        parts = prepare_data(config, stages, jobs=args.jobs or len(os.sched_getaffinity(0)))
    print(f"ready: all {parts} parts of {config.name} are below {config.data.cache_dir}")
    return 0
