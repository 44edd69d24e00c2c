"""Run the whole pipeline of a config, from nothing to the report."""

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("speedrun"))
