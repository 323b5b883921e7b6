"""Stages for the process: other libraries' threads, and constants that upstream recomputes."""
