"""Files, digests and fingerprints: atomic, private, checksummed."""
