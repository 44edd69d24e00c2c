"""How the loss grows beyond the context, with windows and attention sinks; ``--help`` says how."""

from modern_llm.cli import script

if __name__ == "__main__":
    raise SystemExit(script("experiment-sinks"))
