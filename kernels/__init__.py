"""Low-precision kernels, each beside the PyTorch reference that defines its result."""
