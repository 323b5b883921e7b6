"""Stages that replace how single layers compute."""
