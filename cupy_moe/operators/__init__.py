"""One file a family of operators: signatures, arguments, launches. Public names are those of `cupy_moe`."""
