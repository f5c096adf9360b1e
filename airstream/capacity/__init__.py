"""Many plans at once: which model fits which machine, and how fast it would be."""
