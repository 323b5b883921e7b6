"""What is done to a model once: plan, capture, try, verify, keep or undo, and a receipt of it all."""
