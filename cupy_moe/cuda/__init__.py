"""Plans -> launches on a device: argument structs, loaded kernels, limits."""
