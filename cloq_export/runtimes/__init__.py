"""From files to logits: one module per engine, each working from what is on disk alone."""
