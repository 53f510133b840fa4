"""A whole training step as one unit: run operator by operator, or captured once in a CUDA graph and replayed."""
