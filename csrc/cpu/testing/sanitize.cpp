// Every kernel of every instruction set, under sanitizers.
#include "../../testing/linearised_case.h"
#include "../../testing/streams_case.h"

using namespace sfk;

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 20;
  for (const char* isa : {"generic", "avx2", "avx512", "avx512bf16", "amx"}) {
    if (!set_isa(isa)) continue;
    const bool all = std::strcmp(isa, "amx") != 0 && std::strcmp(isa, "avx512bf16") != 0;  // the rest is avx512's
    for (int i = 0; i < rounds; ++i) {
      for (int k = 0; k < 4; ++k) rounded_case(kernels());
      if (!all) continue;
      attention_case<double>(kernels(), false, i % 2), attention_case<float>(kernels(), false, i % 2);
      attention_case<double>(kernels(), true), attention_case<float>(kernels(), true);
      features_case<double>(kernels()), features_case<float>(kernels());
      sinkhorn_case<double>(kernels()), sinkhorn_case<float>(kernels());
      linearised_case<double>(kernels()), linearised_case<float>(kernels());
      pack_case<double>(kernels()), pack_case<float>(kernels());
      stream_case<double>(kernels(), i % 2), stream_case<float>(kernels(), i % 2);
    }
    std::printf("%s: %d rounds, %d failures so far\n", isa, rounds, failures);
  }
  return failures ? 1 : 0;
}
