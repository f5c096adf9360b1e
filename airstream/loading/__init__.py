"""From what the user asks for to everything that is known of a model before its first weight is read."""
