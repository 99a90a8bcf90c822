"""Numeric inner loops: arrays in, arrays out. `cpu` is Numba and LLVM IR, without torch; `gpu` is Triton, for torch."""
