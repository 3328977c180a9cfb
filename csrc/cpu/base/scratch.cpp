#include "scratch.h"

#include <mutex>
#include <new>
#include <vector>

namespace sfk {
namespace {

constexpr std::align_val_t kAlign{64};
constexpr std::size_t kSmall = std::size_t{1} << 15;  // the allocator keeps blocks of this size itself
constexpr std::size_t kKept = std::size_t{1} << 24;   // at most 16 MB stay with the process

struct Block {
  void* p;
  std::size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;
  std::size_t total = 0;
};

// Never destroyed: a thread may still be in a kernel while the process exits.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// Sizes are rounded up, so that calls of nearly the same size share blocks.
std::size_t rounded(std::size_t bytes) { return (bytes + kSmall - 1) / kSmall * kSmall; }

}  // namespace

void* take_scratch(std::size_t bytes) {
  if (bytes < kSmall) return ::operator new(bytes, kAlign);
  bytes = rounded(bytes);
  {
    Pool& all = pool();
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (std::size_t i = all.blocks.size(); i-- > 0;) {
      if (all.blocks[i].bytes != bytes) continue;
      void* const p = all.blocks[i].p;
      all.blocks[i] = all.blocks.back();
      all.blocks.pop_back();
      all.total -= bytes;
      return p;
    }
  }
  return ::operator new(bytes, kAlign);
}

void give_scratch(void* p, std::size_t bytes) noexcept {
  if (bytes >= kSmall) {
    bytes = rounded(bytes);
    Pool& all = pool();
    const std::lock_guard<std::mutex> lock(all.mutex);
    while (!all.blocks.empty() && all.total + bytes > kKept) {  // the oldest go first
      ::operator delete(all.blocks.front().p, kAlign);
      all.total -= all.blocks.front().bytes;
      all.blocks.erase(all.blocks.begin());
    }
    if (bytes <= kKept) {
      try {
        all.blocks.push_back({p, bytes});
        all.total += bytes;
        return;
      } catch (const std::bad_alloc&) {  // no room to remember it: give it back
      }
    }
  }
  ::operator delete(p, kAlign);
}

}  // namespace sfk
