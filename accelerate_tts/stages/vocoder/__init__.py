"""Stages for vocoders and VITS: the same sums in fewer operators."""
