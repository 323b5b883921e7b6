// Teams of threads of the OpenMP that torch itself has loaded. dispatch.cpp is told where that is.
//
// The library is linked with none: two of them in one process have threads each, which spin on the same cores.
#pragma once
#include <cstdint>

struct Threads {
  void (*parallel)(void (*work)(void*), void* data, unsigned threads, unsigned flags);  // as GCC's runtime has it
  void (*barrier)();
  int (*number)();
  int (*count)();
};

extern const Threads* threads_of_torch;  // never null; without an OpenMP a team is one thread

// One thread of a team.
struct Team {
  int64_t me, all;
  void barrier() const {
    if (all > 1) threads_of_torch->barrier();
  }
};

template <class Work>
inline __attribute__((always_inline)) void in_team(int threads, const Work& work) {
  struct Alias {
    static void run(void* data) {
      (*static_cast<const Work*>(data))(Team{threads_of_torch->number(), threads_of_torch->count()});
    }
  };
  threads_of_torch->parallel(Alias::run, const_cast<Work*>(&work), unsigned(threads), 0);
}
