"""Side-by-side measurements: `python -m benchmarks.compare --help`."""
