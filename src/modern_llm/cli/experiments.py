"""Commands that compare architectures."""

import argparse
import shlex
from pathlib import Path

from modern_llm.cli.arguments import add_policy
from modern_llm.config import check_run_name, list_studies, load_study
from modern_llm.config.loading import value_of
from modern_llm.config.study import MODES
from modern_llm.errors import ConfigError

METRICS = ("final_val_loss", "bits_per_byte")


def study_arguments(parser: argparse.ArgumentParser) -> None:
    """Which study, on what terms, and where."""
    parser.add_argument(
        "study", metavar="STUDY", help=f"{', '.join(list_studies())}, or a .json or .yaml file"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value",
        help="change any field of every arm's config, such as pretrain.training.lr=3e-4",
    )  # fmt: skip
    parser.add_argument("--mode", choices=MODES, default="full", help="demo: minutes on two cores")
    parser.add_argument("--seeds", type=_seeds, metavar="N,N,...", help="in place of the study's")
    parser.add_argument("--hold", help="what is held equal: tokens, params, flops or seconds")
    parser.add_argument("--reference", help="arm that the others are compared with")
    parser.add_argument("--threads", type=int, help="of each training on a CPU")
    parser.add_argument(
        "--cells", type=_share, metavar="I/N",
        help="train the I-th of N shares of the cells, compare nothing: for machines side by side",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, help="trainings at once; default: by cores or GPUs")
    parser.add_argument("--budget-s", type=float, help="start no training after so many seconds")
    parser.add_argument("--speed-rounds", type=int, help="measure speed apart, so many rounds")
    _output_arguments(parser)


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metric", choices=METRICS, default=METRICS[0], help="of the verdicts")
    parser.add_argument("--output-dir", type=Path, default=Path("experiments/runs"))
    add_policy(parser)


def study(args: argparse.Namespace) -> int:
    """Train what is missing of a study, and compare; 1 when there is nothing to compare."""
    names = ("seeds", "hold", "reference", "threads", "budget_s", "speed_rounds")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    pairs = [item.partition("=") for item in args.overrides]
    if bad := [field for field, equals, _ in pairs if not equals]:
        raise ConfigError(f"{' '.join(bad)}: write section.field=value")
    config = load_study(
        args.study, mode=args.mode, **given,
        overrides={field: value_of(text) for field, _, text in pairs},
    )  # fmt: skip
    from modern_llm.experiments.study import Study

    command = shlex.join(["modern-llm", *args.command])
    whole = Study(config, output=args.output_dir, jobs=args.jobs, plugins=args.plugin)
    if args.cells is not None:
        cells, failed = whole.train_share(*args.cells)
        for name, reason in failed.items():
            print(f"no result: {name}: {reason}")
        print(f"share {args.cells[0]} of {args.cells[1]}: {len(cells)} cells, {len(failed)} failed")
        return 1 if cells and len(failed) == len(cells) else 0
    outcome = whole.run(command=command, on_exists=args.on_exists, metric=args.metric)
    return _show(outcome.folder, outcome.left_out)


def _share(text: str) -> tuple[int, int]:
    """``2/8`` as its numbers."""
    share, slash, shares = text.partition("/")
    if not (slash and share.isdecimal() and shares.isdecimal() and 1 <= int(share) <= int(shares)):
        raise argparse.ArgumentTypeError(f"{text!r}: write I/N with I from 1 to N, such as 2/8")
    return int(share), int(shares)


def _seeds(text: str) -> list[int]:
    """``0,1,2`` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        way_out = "write numbers with commas between, such as 0,1,2"
        raise argparse.ArgumentTypeError(f"{text!r}: {way_out}") from None


def _show(folder: Path | None, left_out: tuple[str, ...]) -> int:
    from modern_llm.reporting.comparison import quality_table, read_comparison
    from modern_llm.reporting.tables import plain

    if folder is not None:
        print(plain(quality_table(read_comparison(folder))))
    for line in left_out:
        print(f"left out: {line}")
    print(f"report: {folder / 'report.md'}" if folder else "no comparison was written")
    return 0 if folder is not None else 1


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Which results of experiments, and where."""
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help="names of results")
    parser.add_argument("--latest", type=int, help="the newest so many, in place of names")
    parser.add_argument("--reference", help="the one that the others are compared with")
    parser.add_argument(
        "--results", type=Path, default=Path("experiments/runs"), metavar="PATH",
        help="folder below which the results of experiments lie",
    )  # fmt: skip
    parser.add_argument("--name", default="comparison", help="of what is written")
    _output_arguments(parser)


def compare(args: argparse.Namespace) -> int:
    """Compare results of experiments that are there."""
    if bool(args.names) == (args.latest is not None):
        raise ConfigError("give names of experiments, or --latest N, one of them")
    if args.latest is not None and args.latest < 2:
        raise ConfigError(f"--latest {args.latest}: a comparison needs two or more")
    try:
        check_run_name(args.name)
    except ValueError as error:
        raise ConfigError(f"--name: {error}") from None
    from modern_llm.experiments.compare import comparison_record
    from modern_llm.experiments.results import load_results
    from modern_llm.reporting.comparison import write_comparison

    results = load_results(args.results, names=args.names, latest=args.latest)
    record = comparison_record(
        results, reference=args.reference, metric=args.metric, title=args.name
    )
    folder = write_comparison(args.output_dir / args.name, record, on_exists=args.on_exists)
    return _show(folder, ())
