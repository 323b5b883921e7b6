"""Stages for one token of an autoregressive decoder."""
