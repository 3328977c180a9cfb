// Threads: one head per thread, or all threads together on one head where there are too few heads.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "tiles.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace sfk {
namespace {

// The threads that work on one head.  Each publishes a pointer to its partial results; after sync() all may read them.
struct Team {
  int rank = 0, size = 1;
  void* const* slots = nullptr;

  void sync() const {
#ifdef _OPENMP
    if (size > 1) {
#pragma omp barrier
    }
#endif
  }
  template <class State>
  const State& member(int i) const {
    return *static_cast<const State*>(slots[i]);
  }
  // This member's share of [0, n), cut at multiples of `grain`.
  std::pair<int64_t, int64_t> share(int64_t n, int64_t grain) const {
    const int64_t units = (n + grain - 1) / grain;
    return {std::min(n, units * rank / size * grain), std::min(n, units * (rank + 1) / size * grain)};
  }
};

// body(rank, size) on each of a team's threads: `threads` of them, or as many as the runtime grants.
template <class Body>
void on_threads(int threads, Body body) {
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
  body(omp_get_thread_num(), omp_get_num_threads());
#else
  body(0, 1);
#endif
}

// Runs worker.run(item, team) for items 0..count, each worker on its own thread.  Whole rounds give every thread its
// own item; what is left over is shared by all threads, so that no result depends on which thread came first.
template <class Worker>
void run_team(std::vector<std::unique_ptr<Worker>>& workers, int64_t count) {
  const int threads = static_cast<int>(workers.size());
  std::vector<void*> slots(threads);
  for (int i = 0; i < threads; ++i) slots[i] = &workers[i]->shared();
  const int64_t own = threads == 1 ? count : count / threads * threads;
  on_threads(threads, [&](int rank, int size) {
    // Should the runtime grant fewer threads than asked for, the rounds still cover every item.
    for (int64_t i = rank; i < own; i += size) workers[rank]->run(i, Team{0, 1, &slots[rank]});
    for (int64_t i = own; i < count; ++i) workers[rank]->run(i, Team{rank, size, slots.data()});
  });
}

// The same for workers that cannot share an item.
template <class Worker>
void run_each(std::vector<std::unique_ptr<Worker>>& workers, int64_t count) {
  const int threads = static_cast<int>(workers.size());
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
#endif
  for (int rank = 0; rank < threads; ++rank)
    for (int64_t i = rank; i < count; i += threads) workers[rank]->run(i);
}

// Threads worth starting for `flops` of work: below about 20 µs of work each, starting them costs more than it saves.
inline int useful_threads(int wanted, double flops) {
#ifdef _OPENMP
  return static_cast<int>(std::max(1.0, std::min<double>(wanted, flops / 1e6)));
#else
  (void)wanted, (void)flops;
  return 1;
#endif
}

}  // namespace
}  // namespace sfk
