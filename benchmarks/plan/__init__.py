"""A model of a step's time and memory, from shapes; `python -m benchmarks.plan --help`."""
