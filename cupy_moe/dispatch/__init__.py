"""Between the public functions and PyTorch: what tensors and arrays may be, and who has to see a call."""
