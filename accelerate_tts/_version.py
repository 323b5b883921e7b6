"""The version, in one place: read by the build and by `accelerate_tts.__version__`."""

__version__ = "0.2.0"
