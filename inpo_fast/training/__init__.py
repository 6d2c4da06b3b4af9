"""One run: loader, step batch, step, optimizer, metrics, checkpoints, validation."""
