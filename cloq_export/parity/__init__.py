"""From logits to figures that a release can be judged by."""
