"""Compiled code for what PyTorch has no fast operation for. Selectors and engines call it; it knows neither."""
