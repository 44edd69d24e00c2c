"""Layer 4: studies of architectures, by the habits of those who come from other projects."""
