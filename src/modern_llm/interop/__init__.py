"""Trained models elsewhere: folders that transformers and what builds on it can read."""
