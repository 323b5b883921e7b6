"""Parts that are no decoder as graphs of the device, one for each shape. `decode/cuda_graph.py` has the decode step."""
