"""Numeric inner loops: arrays in, arrays out. `cpu` and `int8_cpu` are Numba, torch-free; `*_gpu` Triton, for torch."""
