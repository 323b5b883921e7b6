"""`@cached_embedding`: embed a reference voice once."""
