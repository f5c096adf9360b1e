"""airstream beside its peers: one comparison (`compare`), and all of them by name (`python -m benchmarks.suite`)."""
