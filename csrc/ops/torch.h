// The headers of torch that the operations need. Reading them takes longer than compiling what follows, so
// setup.py has them precompiled: every source in this folder includes this file first.
#ifndef PYENS_OPS_TORCH_H  // once, as a main file too
#define PYENS_OPS_TORCH_H

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/List.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#endif
