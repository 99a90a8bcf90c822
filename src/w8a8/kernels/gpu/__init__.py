"""Kernels for GPUs, in Triton: tensors in, tensors out."""
