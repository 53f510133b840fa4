"""Optimisers and learning-rate schedules for large batches."""
