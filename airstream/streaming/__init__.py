"""Layer batches through a ring of memory, in the order in which they are needed."""
