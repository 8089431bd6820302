"""Compiled kernels, one package for each way to compile them; nothing here is imported before it is needed.

Selectors and engines call them; they know neither.
"""
