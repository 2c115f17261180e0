// 64 bits that look like nothing that the 64 bits they are made of look like: the last step of splitmix64.
//
// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
#pragma once

#include <cstdint>

#include "kernels/types.h"

namespace pyens {

PYENS_HOST_DEVICE inline uint64_t splitmix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace pyens
