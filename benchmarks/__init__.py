"""Measures what the package does to accuracy, size, speed and cost: ``python -m benchmarks``."""

from benchmarks.zoo.operators import complete_torchvision

complete_torchvision()  # before torchmetrics and transformers import it
