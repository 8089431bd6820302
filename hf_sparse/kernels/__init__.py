"""Compiled kernels: `cpu` in C++, `triton` for GPUs. Selectors and engines call them; they import neither."""
