"""Warm packs: the decisions and the compiled code of a tuning, for the next process."""
