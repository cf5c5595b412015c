"""Transformers as an engine: the packed model, and the dequantized reference."""
