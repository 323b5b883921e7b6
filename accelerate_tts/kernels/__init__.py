"""Kernels of our own in C++: what they are told, the library that holds them, and how it is built.

- `csrc/`: the kernels; each unit compiles alone, and once for each instruction set.
- `structs.py`: the structs that they are called with, described once.
- `build.py`: compiles the library, when a wheel is built or in a checkout; wheels do not carry it.
- `library.py`: loads it, checks it, and hands it torch's threads.
"""
