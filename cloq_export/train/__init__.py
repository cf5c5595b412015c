"""From a frozen packed base and examples to trained adapters."""
