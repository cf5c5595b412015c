"""The research bench: methods and peers beside each other. Nothing outside imports it."""
