"""The study 'layers': ``modern-llm experiment layers``; ``--help`` says how."""

import sys

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("experiment", ["layers", *sys.argv[1:]]))
