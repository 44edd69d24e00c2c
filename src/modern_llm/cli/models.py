"""Commands that use a trained model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from modern_llm.cli.arguments import CHECKPOINT_HELP, add_policy, checkpoint_of

if TYPE_CHECKING:
    from modern_llm.inference.session import Sampler, Session


def session_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint and sampling; names of several words in both spellings."""
    parser.add_argument("--checkpoint", type=Path, required=True, help=CHECKPOINT_HELP)
    parser.add_argument(
        *("--max-new-tokens", "--max_new_tokens"), type=int, default=None,
        help="longest answer; default: 128, or half of a shorter context",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-k", "--top_k", type=int, default=0, help="0: off")
    parser.add_argument("--top-p", "--top_p", type=float, default=1.0, help="1: off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")


def _session(args: argparse.Namespace) -> "tuple[Session, Sampler]":
    """The model of the flags, and how it is to draw."""
    from modern_llm.inference.session import Sampler, load_model

    sampler = Sampler(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    session = load_model(checkpoint_of(args.checkpoint, args), device=args.device)
    session.new_tokens(sampler)  # refuses too many before anything is shown
    return session, sampler


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Sampling and prompts."""
    session_arguments(parser)
    parser.add_argument(
        "--plain", action="store_true",
        help="continue the text as it is, without the markers of a chat (after pretraining)",
    )  # fmt: skip
    parser.add_argument("prompts", nargs="+", help="one answer to each")


def generate(args: argparse.Namespace) -> int:
    """Answer each prompt."""
    session, sampler = _session(args)
    for reply in session.complete(args.prompts, sampler=sampler, plain=args.plain):
        print(reply.text)
    return 0


def chat(args: argparse.Namespace) -> int:
    """Talk with a checkpoint."""
    session, sampler = _session(args)
    from modern_llm.inference.chat import chat, introduce

    introduce(session)
    chat(session, sampler=sampler)
    return 0


def inference_arguments(parser: argparse.ArgumentParser) -> None:
    """Sampling, and prompts in place of a dialogue."""
    session_arguments(parser)
    parser.set_defaults(temperature=0.8, top_k=40)
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT",
        help="complete this and end, in place of samples and a dialogue; may be repeated",
    )  # fmt: skip


def inference(args: argparse.Namespace) -> int:
    """Show what a checkpoint is and samples of it, then go on with what is typed."""
    session, sampler = _session(args)
    from modern_llm.inference.chat import chat, introduce, show_samples

    introduce(session)
    try:
        show_samples(session, args.prompt, sampler=sampler, plain=session.continues)
    except KeyboardInterrupt:
        if args.prompt:
            raise
        print("(stopped)")
    if not args.prompt:
        chat(session, sampler=sampler, plain=session.continues)
    return 0


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint and target."""
    parser.add_argument("checkpoint", type=Path, help=CHECKPOINT_HELP)
    parser.add_argument("target", type=Path, help="folder to write")
    add_policy(parser)


def export(args: argparse.Namespace) -> int:
    """Write a checkpoint for transformers, and read it back."""
    from modern_llm.interop.transformers_export import export_transformers

    checkpoint = checkpoint_of(args.checkpoint, args)
    done = export_transformers(checkpoint, args.target, on_exists=args.on_exists)
    if done is None:
        print(f"{args.target} exists; left as it is")
    else:
        print(
            f"{done.folder}: {done.architecture}; logits differ by at most "
            f"{done.max_difference:.1e} when transformers reads it back"
        )
    return 0
