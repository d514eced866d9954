"""The same training in PyTorch: with the same numbers and images, and no arithmetic in common."""
