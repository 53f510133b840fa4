"""A model, a loss and batches as a function of one vector, and the checks before that."""
