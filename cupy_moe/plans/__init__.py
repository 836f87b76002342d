"""Sizes and limits of a device -> what to launch: a file a family, with every threshold and its reason."""
