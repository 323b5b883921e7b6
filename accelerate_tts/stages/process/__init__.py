"""Stages for the process: other libraries' threads, progress bars, constants."""
