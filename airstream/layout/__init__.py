"""Which bytes of a checkpoint become which tensor, and where they lie in memory."""
