"""Models: read a source, find its blocks and linear layers, run the blocks in order."""
