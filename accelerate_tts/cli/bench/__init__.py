"""`accelerate-tts bench`: the five systems, untouched against tuned, on this machine."""
