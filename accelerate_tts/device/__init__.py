"""Detection and set-up of the machine. Independent of models."""
