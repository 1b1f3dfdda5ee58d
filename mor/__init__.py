"""Mixture-of-Recursions language models: train, evaluate, convert, generate and show (arXiv 2507.10524)."""

__version__ = "0.1.0"
