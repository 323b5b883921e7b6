"""Receipts: the stages that were tried on a loaded object, their measurements and the verdicts."""
