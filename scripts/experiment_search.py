"""The study 'search': ``modern-llm experiment search``; ``--help`` says how."""

import sys

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("experiment", ["search", *sys.argv[1:]]))
