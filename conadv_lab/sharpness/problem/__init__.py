"""A model, a loss and batches as a function of one vector, and what is checked before it is one."""
