"""Check the outputs of calls, and repeat a faulty call on the untouched model."""
