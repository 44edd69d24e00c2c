"""Trained checkpoints at work: completions and chat."""
