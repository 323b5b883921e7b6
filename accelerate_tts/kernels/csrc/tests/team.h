// Threads as an OpenMP has them, handed to the library in place of torch's.
#pragma once

namespace tests {

extern void* const of_gcc[4];
extern void* const of_llvm[6];

}  // namespace tests
