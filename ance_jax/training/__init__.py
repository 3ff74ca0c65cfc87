"""The training loop, its step, refreshes and resuming."""
