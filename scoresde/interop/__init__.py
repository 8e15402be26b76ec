"""Foreign checkpoints: one format a file, key maps and readers only."""
