#include "team.h"

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace tests {
namespace {

struct {
  std::mutex lock;
  std::condition_variable all_here;
  int size = 1, waiting = 0, turn = 0;
} team;
thread_local int number = 0;

void parallel(void (*work)(void*), void* data, unsigned threads, unsigned) {
  team.size = int(threads);
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; i++)
    others.emplace_back([=] {
      number = int(i);
      work(data);
    });
  number = 0;
  work(data);
  for (auto& other : others) other.join();
}
void barrier() {
  std::unique_lock<std::mutex> held(team.lock);
  const int turn = team.turn;
  if (++team.waiting == team.size) {
    team.waiting = 0;
    team.turn++;
    team.all_here.notify_all();
  } else
    team.all_here.wait(held, [&] { return team.turn != turn; });
}
int thread_number() { return number; }
int thread_count() { return team.size; }

// Entry points of LLVM's runtime.
int asked_for = 1;
int32_t global_number(const void*) { return number; }
void push_threads(const void*, int32_t, int32_t threads) { asked_for = threads; }
void fork_call(const void*, int32_t, void (*work)(int32_t*, int32_t*, void*, void*), void* first, void* second) {
  struct Call {
    void (*work)(int32_t*, int32_t*, void*, void*);
    void *first, *second;
  } call = {work, first, second};
  parallel(
      [](void* data) {
        const Call& call = *static_cast<Call*>(data);
        int32_t own = number;
        call.work(&own, &own, call.first, call.second);
      },
      &call, unsigned(asked_for), 0);
}
void llvm_barrier(const void*, int32_t) { barrier(); }

}  // namespace

void* const of_gcc[] = {reinterpret_cast<void*>(parallel), reinterpret_cast<void*>(barrier),
                        reinterpret_cast<void*>(thread_number), reinterpret_cast<void*>(thread_count)};
void* const of_llvm[] = {reinterpret_cast<void*>(global_number), reinterpret_cast<void*>(push_threads),
                         reinterpret_cast<void*>(fork_call),     reinterpret_cast<void*>(llvm_barrier),
                         reinterpret_cast<void*>(thread_number), reinterpret_cast<void*>(thread_count)};

}  // namespace tests
