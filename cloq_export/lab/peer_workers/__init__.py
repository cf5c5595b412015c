"""Scripts that run in the environments of other quantizers; nothing here imports this package."""
