"""Layers of few rows on CPUs, written in C and compiled on the machine they run on."""
