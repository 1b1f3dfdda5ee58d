"""Measures of a model: is it causal, how well does it predict, how does it route."""
