// Denormal numbers, which processors handle a hundred times slower: e^x of what is far below a maximum is full of them.
#pragma once
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace sfk {
namespace {

// While it lives they are 0 on this thread, as operands and as results.
#if defined(__SSE2__)
class NoDenormals {
 public:
  NoDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before_); }
  NoDenormals(const NoDenormals&) = delete;
  NoDenormals& operator=(const NoDenormals&) = delete;

 private:
  unsigned before_;
};
#else
struct NoDenormals {
  ~NoDenormals() {}
};
#endif

}  // namespace
}  // namespace sfk
