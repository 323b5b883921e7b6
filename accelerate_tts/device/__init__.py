"""What machine this is, and how it is made ready. Nothing here knows of models."""
