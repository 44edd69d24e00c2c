"""Commands that use a trained model."""

import argparse
from pathlib import Path

from modern_llm.cli.arguments import add_policy


def session_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint and sampling."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--max-new-tokens", type=int, default=None)
    parser.add_argument("--temperature", type=float, default=0.7, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0: off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")


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
    from modern_llm.inference.session import Sampler, load_model

    session = load_model(args.checkpoint, device=args.device)
    sampler = Sampler(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    for reply in session.complete(args.prompts, sampler=sampler, plain=args.plain):
        print(reply.text)
    return 0


def chat(args: argparse.Namespace) -> int:
    """Talk with a checkpoint."""
    from modern_llm.inference.chat import chat
    from modern_llm.inference.session import Sampler, load_model

    sampler = Sampler(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed)
    chat(load_model(args.checkpoint, device=args.device), sampler=sampler)
    return 0


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Checkpoint and target."""
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder of a policy")
    parser.add_argument("target", type=Path, help="folder to write")
    add_policy(parser)


def export(args: argparse.Namespace) -> int:
    """Write a checkpoint for transformers, and read it back."""
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
