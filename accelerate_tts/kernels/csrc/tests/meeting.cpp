// Threads that wait for each other: nobody goes on before all have come, however late one of them is.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "../threads.h"
#include "library.h"
#include "reference.h"

namespace tests {
namespace {

#if OWN_MEETING

// Rounds in which `late` of a thousand arrivals are by a millisecond too late for those that spin.
bool together(int threads, int rounds, int late) {
  Meeting meeting;
  std::vector<int> done(size_t(threads) * 16);  // of each thread, in a line of its own; written without a lock
  std::atomic<bool> right{true};
  const auto work = [&](int me) {
    std::mt19937 random(unsigned(me) + 1);
    for (int now = 1; now <= rounds; now++) {
      if (int(random() % 1000) < late) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      done[size_t(me) * 16] = now;
      meeting.wait(uint32_t(threads));
      for (int other = 0; other < threads; other++)
        if (done[size_t(other) * 16] != now) right = false;
      meeting.wait(uint32_t(threads));
    }
  };
  std::vector<std::thread> others;
  for (int me = 1; me < threads; me++) others.emplace_back(work, me);
  work(0);
  for (auto& other : others) other.join();
  return right;
}

#endif

}  // namespace

void meetings() {
#if OWN_MEETING
  const struct {
    int threads, rounds, late;
  } cases[] = {{2, 20000, 0}, {2, 500, 300}, {3, 5000, 10}, {8, 500, 20}};
  for (const auto& one : cases)
    if (!together(one.threads, one.rounds, one.late)) {
      std::printf("a meeting of %d: one went on before all had come\n", one.threads);
      failures++;
    }
  std::printf("meetings: %s\n", failures ? "WRONG" : "right");
#endif
}

}  // namespace tests
