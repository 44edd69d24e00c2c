"""Layer 0: artifacts (the only writer of results), devices, seeding, signals, environment, logs."""
