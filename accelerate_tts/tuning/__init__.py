"""Tuning, once at load: warm up, capture, try, compare, time, keep or undo."""
