"""Texts: their files, all read in the same way, and the token ids that are made of them."""
