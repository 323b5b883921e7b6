"""Kernels in Triton for a decode step on a GPU. None ever ran on a device: a CPU shows them in Triton's interpreter."""
