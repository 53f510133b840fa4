"""The simulator's results as one page."""
