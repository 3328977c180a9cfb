// Packed batches: the rows of N segments one after another.  What a head of a batch element is elsewhere, a head of a
// segment is here: every worker is one of the dense kernels', on parameters that are set to one segment after another.
#pragma once
#include <atomic>
#include <numeric>

#include "attention_backward.h"
#include "causal_backward.h"

namespace sfk {
namespace {

// A head of a segment is shared by all threads where each of them gets this many tiles of it.
constexpr int64_t kSharedTiles = 8;

// Tensors of tokens, to rows first..last of those of the pack.
inline void take_rows(View& v, const View& all, int64_t first, int64_t last) {
  if (!all) return;
  v.data = static_cast<char*>(all.data) + first * all.stride[2] * element_size(all.dtype);
  v.size[2] = last - first;
}

// Tensors with an element a segment, to that of segment n.
inline void take_element(View& v, const View& all, int64_t n) {
  if (all) v.data = static_cast<char*>(all.data) + n * all.stride[0] * element_size(all.dtype);
}

// `own` becomes segment n of the pack.
inline void take_segment(AttentionParams& own, const PackedParams& p, int64_t n) {
  const int64_t q = p.first_query(n), q_end = p.first_query(n + 1), k = p.cu_k[n], k_end = p.cu_k[n + 1];
  own.L = q_end - q, own.S = k_end - k;
  own.seed = p.seed + static_cast<uint64_t>(q);
  constexpr View AttentionParams::* kQueries[] = {&AttentionParams::query, &AttentionParams::query_pos,
                                                  &AttentionParams::o, &AttentionParams::d_o,
                                                  &AttentionParams::d_query};
  constexpr View AttentionParams::* kKeys[] = {
      &AttentionParams::key,   &AttentionParams::value,   &AttentionParams::key_pos, &AttentionParams::log_a,
      &AttentionParams::d_key, &AttentionParams::d_value, &AttentionParams::d_log_a};
  constexpr View AttentionParams::* kElements[] = {&AttentionParams::z,       &AttentionParams::c,
                                                   &AttentionParams::d_z,     &AttentionParams::d_c,
                                                   &AttentionParams::d_log_b, &AttentionParams::d_references,
                                                   &AttentionParams::d_hyper, &AttentionParams::d_ref_pos};
  for (auto member : kQueries) take_rows(own.*member, p.*member, q, q_end);
  for (auto member : kKeys) take_rows(own.*member, p.*member, k, k_end);
  for (auto member : kElements) take_element(own.*member, p.*member, n);
}

// Likewise what a scan takes beside the rest.
inline void take_stream(StreamViews& own, const PackedStreamParams& p, int64_t n) {
  const int64_t k = p.cu_k[n], k_end = p.cu_k[n + 1];
  take_rows(own.log_decay, p.log_decay, k, k_end);
  take_rows(own.d_log_decay, p.d_log_decay, k, k_end);
  constexpr View StreamViews::* kStates[] = {&StreamViews::initial, &StreamViews::final_state, &StreamViews::d_final,
                                             &StreamViews::d_initial};
  for (auto member : kStates) take_element(own.*member, p.*member, n);
}

// A dense worker, whose parameters are its own.
template <class Inner>
class PackedWorker {
 public:
  PackedWorker(const PackedStreamParams& p, const CausalParams& largest, int threads)
      : pack_(p), own_(largest), inner_(own_, threads) {}
  auto& shared() { return inner_.shared(); }
  void run(int64_t n, int64_t h, const Team& team) {
    take_segment(own_, pack_, n);
    take_stream(own_, pack_, n);
    inner_.run(h, team);  // B = 1: an item is a head
  }

 private:
  const PackedStreamParams& pack_;
  CausalParams own_;
  Inner inner_;
};

// A worker that shares nothing, in the form of one that could.
template <class Inner>
class Alone : public Inner {
 public:
  Alone(const CausalParams& p, int) : Inner(p) {}
  int& shared() { return nothing_; }
  void run(int64_t item, const Team&) { Inner::run(item); }

 private:
  int nothing_ = 0;
};

struct PackedItem {
  int64_t n, h;
};

// Which threads work on what.  Whether a head of a segment is shared, and by how many, depends on the segment alone,
// and so do its bits; who takes one that is not shared depends on who is free.
struct PackedPlan {
  CausalParams largest;  // the longest segment, for the sizes of scratch
  int threads = 1;
  std::vector<PackedItem> shared, alone;  // head by head, as a worker packs the references of one; the longest first

  PackedPlan(const PackedStreamParams& p, double work, bool can_share) : largest(p) {
    static_cast<StreamViews&>(largest) = p;
    threads = useful_threads(p.threads, work * attention_flops(p));
    largest.L = largest.S = 0;
    std::vector<int64_t> order(p.N);
    std::iota(order.begin(), order.end(), int64_t{0});
    for (int64_t n : order) {
      largest.L = std::max(largest.L, p.queries(n));
      largest.S = std::max(largest.S, p.keys(n));
    }
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return p.queries(a) + p.keys(a) > p.queries(b) + p.keys(b); });
    const int64_t own = p.H / p.threads * p.threads;  // as in run_team
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t n : order) (can_share && h >= own && is_long(p, n, work) ? shared : alone).push_back({n, h});
  }

 private:
  bool is_long(const PackedParams& p, int64_t n, double work) const {
    AttentionParams one = p;
    one.L = p.queries(n), one.S = p.keys(n);
    const int64_t rows = 2 * kSharedTiles * p.threads * tile_rows(p.M);
    return p.threads > 1 && one.L + one.S >= rows &&
           useful_threads(p.threads, work * attention_flops(one)) == p.threads;
  }
};

// work: FLOPs in units of those of attention's forward; make(largest, threads): a worker, whose items are (n, h).
template <class Make>
void run_packed(const PackedStreamParams& p, double work, bool can_share, Make make) {
  if (p.N * p.H == 0) return;
  const PackedPlan plan(p, work, can_share);
  std::vector<decltype(make(plan.largest, 1))> workers;
  std::vector<void*> slots;
  for (int i = 0; i < plan.threads; ++i) {
    workers.push_back(make(plan.largest, plan.threads));
    slots.push_back(&workers[i]->shared());
  }
  std::atomic<size_t> next{0};
  on_threads(plan.threads, [&](int rank, int size) {
    for (const PackedItem& item : plan.shared) workers[rank]->run(item.n, item.h, Team{rank, size, slots.data()});
    for (size_t i; (i = next.fetch_add(1)) < plan.alone.size();)
      workers[rank]->run(plan.alone[i].n, plan.alone[i].h, Team{0, 1, &slots[rank]});
  });
}

template <class Inner>
void run_dense(const PackedStreamParams& p, double work, bool can_share) {
  run_packed(p, work, can_share, [&](const CausalParams& largest, int threads) {
    return std::make_unique<PackedWorker<Inner>>(p, largest, threads);
  });
}

template <class F>
void packed_forward(const PackedStreamParams& p) {
  p.causal ? run_dense<Alone<CausalWorker<F>>>(p, 1, false) : run_dense<ForwardWorker<F>>(p, 1, true);
}

template <class F>
void packed_backward(const PackedStreamParams& p) {
  p.causal ? run_dense<Alone<CausalBackwardWorker<F>>>(p, 2.5, false) : run_dense<BackwardWorker<F>>(p, 2.5, true);
}

}  // namespace
}  // namespace sfk
