"""Bytes on disk: atomic writes, readers that trust nothing, shards, fingerprints, versions and spellings of paths."""
