"""Guidance: scores made from scores, sharpened or conditioned."""
