// Compares every kernel with plain scalar loops, at each instruction set that this processor has. `make kernels-test`.
//
// Needs neither torch nor Python, so that it also runs under an emulator. Arguments select instruction sets by name.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>

#include "library.h"
#include "reference.h"
#include "team.h"

using namespace tests;

int main(int count, char** named) {
  meetings();
  for (int i = 0; const char* name = accelerate_tts_level(i); i++) {
    if (count > 1 && std::find_if(named + 1, named + count, [&](char* one) { return !strcmp(one, name); }) == named + count)
      continue;
    const std::string level = accelerate_tts_choose(name);
    if (level != name) {
      std::printf("%s: this processor lacks it\n", name);
      continue;
    }
    const int before = failures;
    accelerate_tts_use_threads(0, of_gcc);  // without an OpenMP
    residual(level, 1, 40, 64, 64, 3);
    convolutions(level);
    accelerate_tts_use_threads(2, of_llvm);
    tokens(level);
    convolutions(level);
    accelerate_tts_use_threads(1, of_gcc);
    few_rows(level);
    tokens(level);
    convolutions(level);
    for (int64_t length : {1, 15, 33, 64, 70, 129, 300}) {
      transformer(level, 2, length, 1 + length % 2, length % 3 == 0, int(1 + length % 3));
      residual(level, 2, length, length % 2 ? 64 : 192, 64, int(1 + length % 3));
    }
    std::printf("%s: %s\n", name, failures == before ? "right" : "WRONG");
    std::fflush(stdout);
  }
  return failures != 0;
}
