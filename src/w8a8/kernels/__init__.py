"""Numeric inner loops: arrays in, arrays out. `cpu` is Numba and torch-free."""
