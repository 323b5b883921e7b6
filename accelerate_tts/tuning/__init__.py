"""Tuning at load time: warm up, capture inputs, try stages, compare, time, keep or undo."""
