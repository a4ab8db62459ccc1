"""The zoo: discovery, and torch-pruning beside it, on every architecture at hand."""
