"""Calibration: from a text to the second-order statistics of every layer's input."""
