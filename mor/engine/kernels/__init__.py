"""Triton kernels of the engine on CUDA devices.

Importing a module of this package imports `triton`, which comes with CUDA builds of torch. A function runs its kernel
on CUDA tensors and its twin in plain PyTorch on others: that of the same name in `mor.engine.plain_ops`, or the one
beside it. None waits for the device, and none looks at values to choose shapes, so all can be captured in CUDA graphs
once they have run, and so been compiled, for tensors of such types and alignment.
"""
