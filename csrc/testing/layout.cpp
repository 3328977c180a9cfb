// How the host lays attention out on a device: tells it without a device and without running anything.
//
// Every line of the input is
//   major processors shared_bytes has_clusters | backward B H S M D E T dtype
// without the bar (L = S, dtype as in params.h), every line of the output
//   cluster warps buffers shared_bytes problems groups narrow_warps narrow_turns narrow_in_grid
// and cluster is 0 where the keys do not fit; narrow: of the forward for logits that lie close together.
#include <iostream>

#include "cuda/attention_narrow.cu"

int main() {
  using namespace sfk;
  cuda::Device device;
  AttentionParams p;
  int backward = 0, dtype = 0, has_clusters = 0;
  while (std::cin >> device.major >> device.processors >> device.shared >> has_clusters >> backward >> p.B >> p.H >>
         p.S >> p.M >> p.D >> p.E >> p.T >> dtype) {
    device.clusters = has_clusters ? cuda::kLargestCluster : 1;
    p.L = p.S, p.key.dtype = static_cast<Dtype>(dtype);
    const cuda::Layout l = cuda::layout(device, p, backward != 0);
    const cuda::Layout narrow = l.cluster ? cuda::narrow_layout<BF16>(p, l, device) : l;
    std::cout << l.cluster << ' ' << l.warps << ' ' << l.buffers << ' ' << l.shared << ' ' << l.problems << ' '
              << l.groups << ' ' << narrow.warps << ' ' << (l.cluster ? cuda::turns(device, p, narrow) : 0) << ' '
              << narrow.in_grid << '\n';
  }
}
