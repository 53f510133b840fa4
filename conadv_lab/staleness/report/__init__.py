"""The simulator's answers as one page."""
