"""Every architecture, streamed and compared with the resident model: `python -m tests.matrix` runs all of it."""
