"""Measures what the package does to accuracy, size, speed and cost: ``python -m benchmarks``."""
