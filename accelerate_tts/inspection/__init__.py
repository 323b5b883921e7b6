"""Read-only inspection of a user's objects, modules and calls."""
