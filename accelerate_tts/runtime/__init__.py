"""Handling of each call of a synthesis function."""
