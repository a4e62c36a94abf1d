"""Measurements of speed and of time to quality; see README.md."""
