"""Stages for the decode steps and the prefill of an autoregressive decoder."""
