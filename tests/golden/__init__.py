"""Outputs of the authors' code (github.com/raymin0223/mixture_of_recursions, run with transformers 4.52.4) on small
models: one safetensors file of tensors and one JSON file of options per case. A further pair put here is tested too."""
