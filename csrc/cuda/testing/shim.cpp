#include "shim.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "races.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace sfk::shim {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStack = 128 * 1024;
Schedule schedule;

[[noreturn]] void fail(const char* what, int a, int b) {
  std::fprintf(stderr, "shim: %s (%d, %d)\n", what, a, b);
  std::abort();
}

// What a lane brings to a collective.
union Slot {
  float value;
  uint32_t bits;
  const void* row;
  struct {
    uint32_t a[4], b[2];
  } operands;
};

// Where `size` fibers meet.  Two sets of slots: nobody is two meetings ahead of the slowest reader.
struct Meeting {
  int size = 0, arrived = 0, kind = 0;
  unsigned past = 0;
  uint32_t over = 0;  // when the last one was
  Slot slots[2][kLanes];
};

struct Block {
  int64_t index = 0;
  int rank = 0;
  std::unique_ptr<unsigned char[]> shared;
  int left = 0;
  Meeting all;
  std::vector<Meeting> warps;
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  void* stack = nullptr;
  void* fake_stack = nullptr;
  Block* block = nullptr;
  int thread = 0;
  bool started = false, done = false;
  const Meeting* at = nullptr;  // waits there while `seen` is the number of past meetings
  unsigned seen = 0;
  std::vector<std::pair<void*, const void*>> copies;
  std::vector<size_t> groups;  // how many copies each committed group has
  size_t uncommitted = 0;
  races::Thread accesses;
  bool runnable() const { return !done && (!at || at->past != seen); }
};

struct Cluster {  // or the grid, where its blocks run together
  Grid grid;
  const std::function<void()>* kernel = nullptr;
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Meeting all;
  size_t current = 0, left = 0;
  bool entered = false;
  Fiber home;  // the thread that called run
};

Cluster* now = nullptr;

std::vector<void*>& stacks() {  // kept for the next launch
  static std::vector<void*> kept;
  return kept;
}

void* new_stack() {
  if (!stacks().empty()) {
    void* p = stacks().back();
    stacks().pop_back();
    return p;
  }
  void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) fail("no memory for a stack", 0, 0);
  return p;
}

#ifdef __SANITIZE_ADDRESS__
const void* home_bottom = nullptr;
size_t home_size = 0;

void arrived(Fiber& to, bool from_home) {
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(to.fake_stack, &bottom, &size);
  if (from_home) home_bottom = bottom, home_size = size;
}
#else
void arrived(Fiber&, bool) {}
#endif

// From one fiber to another.  Without sanitizers by jumps after the first entry: swapcontext is two system calls.
void change(Fiber& from, Fiber& to) {
  const bool home = &to == &now->home;
  races::run(home ? nullptr : &to.accesses, now->grid.threads);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, home ? home_bottom : to.stack,
                                 home ? home_size : kStack);
  to.started = true;
  swapcontext(&from.context, &to.context);
  arrived(from, false);
#else
  if (_setjmp(from.resume)) return;
  if (to.started) _longjmp(to.resume, 1);
  to.started = true;
  setcontext(&to.context);
#endif
}

// Of the `size` fibers around the current one the first after it that can run; null where none can.
Fiber* next_of(size_t size) {
  const size_t first = now->current / size * size, at = now->current - first;
  for (size_t k = 1; k <= size; ++k) {
    const size_t i = first + (at + (schedule.descending ? size - k : k)) % size;
    if (!now->fibers[i].runnable()) continue;
    now->current = i;
    return &now->fibers[i];
  }
  return nullptr;
}

// The fiber that goes on; the caller where none is left.
Fiber& next() {
  if (now->left == 0) return now->home;
  Fiber* near = nullptr;
  if (schedule.first == First::warp) near = next_of(kLanes);
  if (schedule.first == First::block) near = next_of(now->grid.threads);
  if (near || (near = next_of(now->fibers.size()))) return *near;
  fail("threads wait for others that never come: thread, block", now->fibers[now->current].thread,
       static_cast<int>(now->fibers[now->current].block->index));
}

// The memory of a block goes with its last thread, whoever waits, as on the device.
void leave(Block& block) {
  races::leave(block.shared.get(), now->grid.shared);
#ifdef __SANITIZE_ADDRESS__
  block.shared.reset();
#else
  std::memset(block.shared.get(), 0xff, now->grid.shared);
#endif
}

void enter() {
  arrived(now->fibers[now->current], !now->entered);
  now->entered = true;
  (*now->kernel)();
  Fiber& self = now->fibers[now->current];
  self.done = true;
  --now->left;
  if (--self.block->left == 0) leave(*self.block);
  change(self, next());
}

Fiber& self() { return now->fibers[now->current]; }

// Waits for everyone; returns the slots that were filled for this meeting.
const Slot* meet(Meeting& m, int kind, int slot, const Slot& value) {
  if (m.arrived == 0) m.kind = kind;
  if (m.kind != kind) fail("two different collectives meet: kinds", m.kind, kind);
  Slot* slots = m.slots[m.past % 2];
  if (slot >= 0) slots[slot] = value;
  if (++m.arrived == m.size) {
    m.arrived = 0;
    ++m.past;
    m.over = races::barrier();
    return slots;
  }
  Fiber& me = self();
  me.at = &m, me.seen = m.past;
  change(me, next());
  me.at = nullptr;
  return slots;
}

void wait(Meeting& m, int kind, races::Scope scope) {
  meet(m, kind, -1, {});
  races::pass(self().accesses, scope, m.over);
}

void start(Fiber& f, Block& block, int thread) {
  f.block = &block, f.thread = thread, f.stack = new_stack();
  races::start(f.accesses, block.rank * now->grid.threads + thread, f.stack, kStack);
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = kStack, f.context.uc_link = nullptr;
  makecontext(&f.context, enter, 0);
}

void start(Cluster& c, int64_t first_block) {
  const int blocks = c.grid.together ? static_cast<int>(c.grid.blocks) : c.grid.cluster;
  c.blocks = std::vector<Block>(blocks);
  c.fibers = std::vector<Fiber>(static_cast<size_t>(blocks) * c.grid.threads);
  c.left = c.fibers.size();
  c.all.size = static_cast<int>(c.left);
  races::barrier();
  for (int r = 0; r < blocks; ++r) {
    Block& b = c.blocks[r];
    b.index = first_block + r, b.rank = r, b.all.size = b.left = c.grid.threads;
    b.shared.reset(new unsigned char[c.grid.shared]);
    std::memset(b.shared.get(), 0xff, c.grid.shared);
    b.warps = std::vector<Meeting>(c.grid.threads / kLanes);
    for (Meeting& w : b.warps) w.size = kLanes;
    for (int i = 0; i < c.grid.threads; ++i) start(c.fibers[static_cast<size_t>(r) * c.grid.threads + i], b, i);
  }
}

}  // namespace

const std::vector<Schedule>& schedules() {
  static const std::vector<Schedule> all = {
      {"any ascending", First::any, false},     {"any descending", First::any, true},
      {"warp ascending", First::warp, false},   {"warp descending", First::warp, true},
      {"block ascending", First::block, false}, {"block descending", First::block, true}};
  return all;
}
void set_schedule(const Schedule& s) { schedule = s; }

void run(const Grid& grid, const std::function<void()>& kernel) {
  if (grid.threads % kLanes || grid.blocks % grid.cluster)
    fail("not whole warps or clusters", grid.threads, grid.cluster);
  for (int64_t first = 0; first < grid.blocks; first += grid.together ? grid.blocks : grid.cluster) {
    Cluster cluster;
    cluster.grid = grid, cluster.kernel = &kernel, cluster.home.started = true;
    now = &cluster;
    start(cluster, first);
    cluster.current = schedule.descending ? cluster.fibers.size() - 1 : 0;
    change(cluster.home, cluster.fibers[cluster.current]);
    now = nullptr;
    for (Fiber& f : cluster.fibers) stacks().push_back(f.stack);
  }
}

int thread_index() { return self().thread; }
int block_threads() { return now->grid.threads; }
int64_t block_index() { return self().block->index; }
int cluster_size() { return now->grid.together ? 1 : now->grid.cluster; }
int cluster_rank() { return now->grid.together ? 0 : self().block->rank; }
void* shared_memory() { return self().block->shared.get(); }

void* map_shared(void* p, int rank) {
  if (rank >= cluster_size()) fail("a block of another cluster: thread, block", self().thread, rank);
  if (now->blocks[rank].left == 0) fail("the memory of a block that has ended: thread, block", self().thread, rank);
  return now->blocks[rank].shared.get() + (static_cast<unsigned char*>(p) - self().block->shared.get());
}

void sync_block() { wait(self().block->all, 1, races::kOfBlock); }
void sync_cluster() { now->grid.together ? sync_block() : wait(now->all, 2, races::kOfCluster); }
int grid_width() { return now->grid.cluster; }
int grid_column() { return static_cast<int>(block_index() % grid_width()); }
int grid_row() { return static_cast<int>(block_index() / grid_width()); }
void sync_grid() {
  if (!now->grid.together) fail("a barrier of a grid whose blocks need not run together", self().thread, 0);
  wait(now->all, 9, races::kOfCluster);
}

namespace {

Meeting& my_warp() { return self().block->warps[self().thread / kLanes]; }

const Slot* meet_warp(int kind, const Slot& value) { return meet(my_warp(), kind, self().thread % kLanes, value); }

}  // namespace

void sync_warp() { wait(my_warp(), 3, races::kOfWarp); }

float shuffle_xor(float x, int mask) {
  Slot mine;
  mine.value = x;
  return meet_warp(4, mine)[self().thread % kLanes ^ mask].value;
}

uint32_t shuffle_xor(uint32_t x, int mask) {
  Slot mine;
  mine.bits = x;
  return meet_warp(8, mine)[self().thread % kLanes ^ mask].bits;
}

float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
float from_f16(uint16_t x) {
  _Float16 y;
  std::memcpy(&y, &x, 2);
  return static_cast<float>(y);
}
uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
uint16_t to_f16(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}

void copy16_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fail("a copy of 16 bytes that is not aligned: thread", self().thread, 0);
  races::copy_begins(shared, global, 16);
  self().copies.emplace_back(shared, global);
  ++self().uncommitted;
}
void copies_commit() {
  self().groups.push_back(self().uncommitted);
  self().uncommitted = 0;
}
void copies_wait(int pending) {
  Fiber& me = self();
  while (me.groups.size() > static_cast<size_t>(pending)) {
    for (size_t i = 0; i < me.groups.front(); ++i) {
      const auto [to, from] = me.copies[i];
      from ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
      races::copy_ends(to, 16);
    }
    me.copies.erase(me.copies.begin(), me.copies.begin() + me.groups.front());
    me.groups.erase(me.groups.begin());
  }
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a matrix row that is not aligned: thread", self().thread, 0);
  const void* from = __builtin_return_address(0);
  Slot mine;
  mine.row = row;
  const Slot* slots = meet_warp(transposed ? 6 : 5, mine);
  const int lane = self().thread % kLanes, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int y, int x) {
      const uint16_t* number = static_cast<const uint16_t*>(slots[8 * i + y].row) + x;
      races::access(number, sizeof *number, false, from);
      return *number;
    };
    const uint16_t low = transposed ? at(2 * t, g) : at(g, 2 * t);
    const uint16_t high = transposed ? at(2 * t + 1, g) : at(g, 2 * t + 1);
    r[i] = low | static_cast<uint32_t>(high) << 16;
  }
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
  Slot mine;
  for (int i = 0; i < 4; ++i) mine.operands.a[i] = a[i];
  mine.operands.b[0] = b0, mine.operands.b[1] = b1;
  const Slot* slots = meet_warp(7, mine);
  const int lane = self().thread % kLanes;
  const auto half = [&](uint32_t both, int k) {
    const uint16_t bits = static_cast<uint16_t>(k % 2 ? both >> 16 : both);
    return bf16 ? from_bf16(bits) : from_f16(bits);
  };
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2, column = 2 * (lane % 4) + i % 2;  // row g + 8·row
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, late = k / 8;
      const float x = half(slots[lane / 4 * 4 + t].operands.a[row + 2 * late], k);
      c[i] += x * half(slots[column * 4 + t].operands.b[late], k);
    }
  }
}

}  // namespace sfk::shim
