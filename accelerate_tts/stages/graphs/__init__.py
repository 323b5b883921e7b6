"""Parts that are no decoder as CUDA graphs, one for each shape. `decode/cuda_graph.py` has the decode step."""
