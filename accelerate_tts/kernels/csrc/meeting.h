// Where the threads of a team wait for each other.
//
// OpenMP's own barrier follows the whole process. GCC's spins for milliseconds while the process has few threads, and
// sleeps at once when it has more than processors, as in any server: a token has hundreds of barriers, and waking up
// takes longer than most waits. Here a thread spins for about as long as that, and sleeps then. Where others use the
// processors, spinning is in vain and costs the thread its turn: after some vain spins threads sleep at once, and one
// wait in sixteen tries again. docs/decisions/0007-decode-step.md has what was measured.
#pragma once
#include <atomic>
#include <climits>
#include <cstdint>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#define OWN_MEETING 1
#else
#define OWN_MEETING 0  // no sleeping by an address that is the same on all systems: OpenMP's barrier serves
#endif

#if OWN_MEETING

// Spins that were not in vain, up to a limit; a vain one takes several away. Of all teams in the process.
struct Calm {
  static constexpr int most = 64, vain = 16;
  std::atomic<int> level{most / 2};
  std::atomic<uint32_t> waits{0};
  bool spins() {
    uint32_t count = waits.load(std::memory_order_relaxed);  // a lost count does not matter
    waits.store(count + 1, std::memory_order_relaxed);
    return level.load(std::memory_order_relaxed) > 0 || count % 16 == 0;
  }
  void add(int change) {
    int now = level.load(std::memory_order_relaxed) + change;
    level.store(now < 0 ? 0 : now > most ? most : now, std::memory_order_relaxed);
  }
};
inline Calm calm;

class Meeting {
 public:
  // Wait until all threads of the team have come here. What they wrote before is seen by all afterwards.
  void wait(uint32_t all) {
    uint32_t now = round.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == all) {
      arrived.store(0, std::memory_order_relaxed);
      round.store(now + 1);  // sequentially consistent, as are the accesses of those that go to sleep
      if (sleeping.load()) syscall(SYS_futex, &round, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
      return;
    }
    if (calm.spins()) {
      if (spun(now)) return calm.add(1);
      calm.add(-Calm::vain);
    }
    sleeping.fetch_add(1);
    while (round.load() == now) syscall(SYS_futex, &round, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
    sleeping.fetch_sub(1);
  }

 private:
  // Spin for 30 to 60 us; return true if the others have come.
  bool spun(uint32_t now) const {
#if defined(__x86_64__)
    for (uint64_t begun = __builtin_ia32_rdtsc(); __builtin_ia32_rdtsc() - begun < (1 << 17); __builtin_ia32_pause())
      if (round.load(std::memory_order_acquire) != now) return true;
#else
    for (int spin = 0; spin < (1 << 13); spin++) {
      if (round.load(std::memory_order_acquire) != now) return true;
#if defined(__aarch64__)
      __asm__ volatile("yield");
#endif
    }
#endif
    return false;
  }

  alignas(64) std::atomic<uint32_t> arrived{0};
  alignas(64) std::atomic<uint32_t> round{0};
  std::atomic<uint32_t> sleeping{0};
};

#endif
