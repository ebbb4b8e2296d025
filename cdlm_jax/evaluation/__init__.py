"""Decoding held-out problems, scoring, and showing the result."""
