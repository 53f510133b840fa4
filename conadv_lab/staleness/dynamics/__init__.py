"""Effects of stale attacks on training: accuracy, sharpness, and lost attack strength."""
