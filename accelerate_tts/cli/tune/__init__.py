"""`accelerate-tts tune`: tune the user's own backend, and show it untouched and tuned beside each other."""
