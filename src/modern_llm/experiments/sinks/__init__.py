"""Attention sinks: how the loss grows beyond the context, by model and by what its cache keeps."""
