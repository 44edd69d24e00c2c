"""Commands that say what there is to choose from."""

import argparse
import json

from modern_llm.config import json_schema, list_presets, load_config


def no_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes nothing."""


def presets(args: argparse.Namespace) -> int:
    """Print each preset with its description."""
    for name in list_presets():
        print(f"{name:<14} {load_config(name).description}")
    return 0


def schema(args: argparse.Namespace) -> int:
    """Print the JSON Schema."""
    print(json.dumps(json_schema(), indent=2, sort_keys=True))
    return 0
