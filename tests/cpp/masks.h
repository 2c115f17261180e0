// Masks for the tests of the kernels that read them.
#pragma once

#include <cstdint>
#include <memory>
#include <random>

// std::vector<bool> is packed; the kernels want bytes.
struct Masks {
  int64_t num_masks, channels;
  std::unique_ptr<bool[]> kept;

  // Of all sizes, the middle one empty and the first full.
  Masks(int64_t n, int64_t c, std::mt19937_64& random)
      : num_masks(n), channels(c), kept(new bool[static_cast<size_t>(n * c)]) {
    for (int64_t i = 0; i < n * c; ++i) {
      const int64_t mask = i / c;
      kept[static_cast<size_t>(i)] = mask == 0 || (mask != n / 2 && random() % 3 > 0);
    }
  }
  bool operator()(int64_t mask, int64_t channel) const {
    return kept[static_cast<size_t>(mask * channels + channel)];
  }
};
