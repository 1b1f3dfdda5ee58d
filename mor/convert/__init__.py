"""Checkpoints of other projects into Mixture-of-Recursions models, and back."""
