"""Compares ways to choose what to prune, on fine-tuned text classifiers."""
