"""Bytes on disk: atomic writes, readers of untrusted files, shards, fingerprints, versions and spellings of paths."""
