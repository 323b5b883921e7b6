"""C++ kernels: their arguments, their library and its build.

- `csrc/`: the kernels. Each unit is compiled separately, once for each instruction set.
- `structs.py`: the single description of the structs that they are called with.
- `build.py`: compiles the library, when a wheel is built or in a checkout. It is not part of wheels.
- `library.py`: loads the library, checks it, and hands it torch's OpenMP threads.
"""
