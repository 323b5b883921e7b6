"""`accelerate-tts demo`: speak with a real English voice, offline, plain and decorated."""
