"""How close streaming comes to the disk: `python -m benchmarks.stream` measures airstream beside the raw link."""
