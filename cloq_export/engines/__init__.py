"""Files in, logits and texts out: what serves a model."""
