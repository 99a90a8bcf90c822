"""Inner loops for CPUs, in Numba and LLVM IR: arrays in, arrays out."""
