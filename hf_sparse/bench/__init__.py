"""Speed of dense and sparse attention, side by side in one run: one layer alone, and models that write."""
