"""`@cached_embedding`: embed each reference voice once."""
