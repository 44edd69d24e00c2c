"""``python -m modern_llm`` is ``modern-llm``."""

from modern_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
