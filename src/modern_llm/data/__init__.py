"""Layer 2: sources, tokenizers, templates, token stores, loaders and batches."""
