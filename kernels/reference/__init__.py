"""Plain torch implementations on every device: slow, short, and the definition of what is right."""
