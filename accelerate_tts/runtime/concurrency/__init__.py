"""Bound how many calls of one object run at once."""
