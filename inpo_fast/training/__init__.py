"""One run: step batch, step, loop, optimizer, metrics, checkpoints, validation."""
