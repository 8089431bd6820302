"""Fitting the laws of a model's heads to the error that they make."""
