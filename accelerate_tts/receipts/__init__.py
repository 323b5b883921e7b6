"""Receipts: what was tried on a loaded object, what it gave, what was kept and why."""
