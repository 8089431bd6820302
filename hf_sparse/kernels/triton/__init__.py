"""Kernels in Triton, for GPUs. Importing any of them needs the package triton, which PyTorch for CUDA brings along."""

try:
    import triton  # noqa: F401
except ImportError as error:
    raise ImportError("the GPU kernels of hf_sparse need the package triton: pip install triton") from error
