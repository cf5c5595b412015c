"""The run directory and the files in it: atomic writes, hostile-safe reads, resume, fingerprints."""
