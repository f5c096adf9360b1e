"""Programs that measure; nothing in `airstream` imports them, and no test asserts a time they report."""
