// Teams of threads of the OpenMP that torch itself has loaded. dispatch.cpp is told where that is.
//
// The library is linked with none: two of them in one process have threads each, which spin on the same cores.
#pragma once
#include <cstdint>

#include "meeting.h"

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
#if OWN_MEETING
  Meeting* meeting;
  void barrier() const {
    if (all > 1) meeting->wait(uint32_t(all));
  }
#else
  void barrier() const {
    if (all > 1) threads_of_torch->barrier();
  }
#endif
};

template <class Work>
inline __attribute__((always_inline)) void in_team(int threads, const Work& work) {
  struct Shared {
    const Work& work;
#if OWN_MEETING
    Meeting meeting;
#endif
    static void run(void* data) {
      auto& shared = *static_cast<Shared*>(data);
#if OWN_MEETING
      shared.work(Team{threads_of_torch->number(), threads_of_torch->count(), &shared.meeting});
#else
      shared.work(Team{threads_of_torch->number(), threads_of_torch->count()});
#endif
    }
  };
#if OWN_MEETING
  Shared shared{work, {}};
#else
  Shared shared{work};
#endif
  threads_of_torch->parallel(Shared::run, &shared, unsigned(threads), 0);
}
