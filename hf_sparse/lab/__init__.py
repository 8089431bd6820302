"""The claims about n^C-sparse attention as experiments that anyone can rerun: bounds, synthetic inputs, real models."""
