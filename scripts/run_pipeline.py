"""Run one stage of a config, or all of them; ``--help`` says how."""

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("run"))
