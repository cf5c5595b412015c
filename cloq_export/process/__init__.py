"""What this process knows of its machine and says to its terminal: memory, processor, signals, progress."""
