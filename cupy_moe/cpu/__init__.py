"""The operators in plain PyTorch, a file a family: what runs for CPU tensors, and the specification."""
