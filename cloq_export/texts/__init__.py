"""Texts: files of them, read in one way whatever they are for, and the token ids that are made of them."""
