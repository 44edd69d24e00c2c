"""Scores of live models: perplexity, exact match, best-of-n, preference, calibration."""
