"""Stages for vocoders and VITS: the same computation in fewer operators."""
