"""What lies on disk: run directory, checkpoint, adapters, certificate, record, model card, and how to look at them."""
