"""The optimisations. Each stage makes a reversible change of one part of a model."""
