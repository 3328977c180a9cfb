// The iterations of a block of queries under a mask: by products where the sums stay in range, else in the log domain.
//
// Ex = e^{ℓ − m};  U = n, V = b;  T times  P = V Exᵀ, U = n P^{−λ_a}, C = U Ex, V = b C^{−λ_b}.  A factor of a query's
// n or V cancels in what it reads, so masses are not normalised and V counts from its largest.
#pragma once
#include "walk.h"

namespace sfk {
namespace {

template <class F>
constexpr bool kIsWide = sizeof(F) == 8;  // what float cannot hold, double does; what that cannot, the log domain

template <class F>
class MaskedIterations {
 public:
  explicit MaskedIterations(const MaskedParams& p_)
      : p(p_),
        refs(p_),
        keys(p_, refs),
        mask(p_, tile_rows(refs.Mp)),
        queries(refs),
        potentials(refs, p_.T),
        Ep(pad<F>(p_.E)),
        masses(p_.S * kQueries),
        u(p_.S * kQueries),
        tile(mask.keys() * kQueries),
        tops_(refs.Mp * kQueries) {}

  void begin(int64_t b_, int64_t h_, F range) {
    b = b_, h = h_;
    refs.pack(p, h);
    mask.begin_head(b, h);
    keys.begin(b, h, mask, range);
  }
  void begin_block(int64_t row0_, int64_t n_) {
    row0 = row0_, n = n_;
    mask.begin_block(row0, n, keys.weights);
    queries.load(p, refs, b, h, row0, n, mask.seen);
  }
  F* masses_of(const KeyTile& at) const { return masses + at.s0 * kQueries; }
  F* u_of(const KeyTile& at) const { return u + at.s0 * kQueries; }

  // out [n][kQueries] = Ex · right [M][kQueries]
  void by_keys(const KeyTile& at, const F* right, F* out) const {
    gemm<F>(at.n, kQueries, p.M, keys.tile(at), refs.Mp, 1, right, kQueries, out, kQueries, false);
  }
  // out [M][kQueries] += Exᵀ · left [n][kQueries]
  void by_references(const KeyTile& at, const F* left, F* out) const {
    gemm<F>(p.M, kQueries, at.n, keys.tile(at), 1, refs.Mp, left, kQueries, out, kQueries, true);
  }

  // By products; false where a sum leaves their range.
  bool iterate(bool backward) {
    if (keys.in_logs) return false;
    for (int64_t t = 0; t < potentials.steps; ++t) {
      F least = 1, *sums = potentials.sums(t);
      fill(sums, refs.M * kQueries, F(0));
      for (const KeyTile& at : mask.tiles) {
        if (t == 0) {
          mask.masses(at, masses_of(at));
          scale_keys<F>(at.n, masses_of(at), keys.first + at.s0, u_of(at));
        } else {
          by_keys(at, potentials.v(t - 1), tile);
          least = std::min(least, divide<F>(at.n * kQueries, masses_of(at), refs.lam_a, tile, u_of(at)));
        }
        by_references(at, u_of(at), sums);
      }
      const Floor<F> floor = floor_of<F>(mask.lowest, backward);
      if (!(least >= floor.row) || !settle_sums<F>(p.M, mask.seen, floor.column, sums)) return false;
      potentials.set_v(t, false);
    }
    return true;
  }

  // The same of logarithms: f^T to u, log n to masses.
  void iterate_in_logs() {
    for (int64_t t = 0; t < potentials.steps; ++t) {
      F* sums = potentials.sums(t);
      fill(tops_.data(), p.M * kQueries, -kInf<F>);
      fill(sums, p.M * kQueries, F(0));
      for (const KeyTile& at : mask.tiles) {
        const F* logits = keys.logs(at);
        if (t == 0) mask.log_masses(at, masses_of(at));
        if (t > 0) lse_of_rows<F>(at.n, p.M, refs.Mp, logits, potentials.v(t - 1), tile);
        set_f(t, at, tile, u_of(at));
        add_columns<F>(at.n, p.M, refs.Mp, logits, u_of(at), tops_, sums);
      }
      log_of_columns<F>(p.M, mask.seen, tops_, sums);
      potentials.set_v(t, true);
    }
  }

  // f^t of a tile, given log P^t (of t > 0).
  void set_f(int64_t t, const KeyTile& at, const F* log_p, F* f) const {
    const F* log_n = masses_of(at);
    for (int64_t s = 0; s < at.n; ++s)
      for (int64_t k = s * kQueries; k < (s + 1) * kQueries; k += kLanes<F>)
        store(f + k, t ? load(log_n + k) - refs.lam_a * load(log_p + k) : load(log_n + k) + keys.log_first[at.s0 + s]);
  }

  void read(bool logs) { potentials.read(p, b, h, row0, n, queries.logits, mask.seen, logs); }

  const MaskedParams& p;
  Refs<F> refs;
  MaskedKeys<F> keys;
  MaskTiles<F> mask;
  BlockQueries<F> queries;
  BlockPotentials<F> potentials;
  int64_t Ep, b = 0, h = 0, row0 = 0, n = 0;
  Buffer<F> masses, u;  // [S][kQueries] n and U^T of the block
  Buffer<F> tile;       // [keys][kQueries]

 private:
  Buffer<F> tops_;  // [Mp][kQueries]
};

inline double masked_flops(const MaskedParams& p) {
  const double pairs = static_cast<double>(p.L) * p.S * p.B * p.H * (p.causal ? 0.5 : 1.0);
  return 2.0 * pairs * (2.0 * static_cast<double>(std::max<int64_t>(p.T, 1)) * p.M + p.E);
}

// A thread a head, and no more threads than are useful.  Heads are begun in their order, so that one may wait for those
// before it.
template <class Worker, class... Shared>
void run_masked(const MaskedParams& p, double flops, Shared&... shared) {
  if (p.B * p.H == 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(useful_threads(p.threads, flops), p.B * p.H));
  std::vector<std::unique_ptr<Worker>> workers;
  for (int i = 0; i < threads; ++i) workers.push_back(std::make_unique<Worker>(p, shared...));
  std::atomic<int64_t> next{0};
#ifdef _OPENMP
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
#endif
  for (int rank = 0; rank < threads; ++rank)
    for (int64_t item; (item = next++) < p.B * p.H;) workers[rank]->run(item);
}

}  // namespace
}  // namespace sfk
