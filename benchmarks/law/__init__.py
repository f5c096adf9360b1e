"""What a token costs with more and more of the weights in memory: `python -m benchmarks.law` measures all of it."""
