"""`accelerate-tts bench`: time the five systems, untouched against tuned, on this machine."""
