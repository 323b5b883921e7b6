"""Change a loaded module and put it back: class swaps, derived weights, offloaded weights."""
