"""The study 'heads': ``modern-llm experiment heads``; ``--help`` says how."""

import sys

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("experiment", ["heads", *sys.argv[1:]]))
