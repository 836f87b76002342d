"""The operators in plain PyTorch, a file a family: for CPU tensors, and as the kernels' specification."""
