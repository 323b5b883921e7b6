"""Stages that compile: torch.compile of whole parts and of repeated blocks."""
