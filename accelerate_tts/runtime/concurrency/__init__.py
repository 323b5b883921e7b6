"""Limits on the number of simultaneous calls of one object."""
