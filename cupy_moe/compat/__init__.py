"""Functions with the signatures of inference engines, and switches that put them in the engines' place."""
