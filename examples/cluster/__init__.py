"""Speech on more than one machine, with Ray. docs/CLUSTER.md describes it."""
