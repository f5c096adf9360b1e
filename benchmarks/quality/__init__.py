"""What codecs cost in quality: `python -m benchmarks.quality` measures it on real weights."""
