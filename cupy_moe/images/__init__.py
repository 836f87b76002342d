"""Sources -> images: targets, the compiler, folders and whom to trust, look-up, prebuilding. No torch."""
