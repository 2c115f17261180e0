// The convolution of every member of an ensemble over its images, with a ReLU and the maximum of windows behind it.
//
//   z[m, b, o, y, x] = bias[m, o] + sum_{c, i, j} weight[m, o, c, i, j] input[(m,) b, c, y s + i d - p, x s' + j d' - p']
//
// Parameter blocks and the launchers, for the CPU. Raw pointers, no torch. (CUDA takes the library's convolution.)
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/int8.h"
#include "kernels/sparse_rows.h"
#include "kernels/types.h"

namespace pyens {

struct ImageSize {
  int64_t height, width;
  int64_t pixels() const { return height * width; }
};

// What is computed of one image.
struct Conv2d {
  int64_t channels, out_channels;
  ImageSize image, kernel, stride, padding, dilation;
  ImageSize
      window;  // of the maximum, side by side: what is left at the end of a row or column is not read; 1 x 1: none
  bool relu;

  int64_t taps() const { return channels * kernel.pixels(); }
  template <class Int>  // int64_t, or torch's symbolic sizes
  static Int positions(const Int& size, const Int& kernel, int64_t stride, int64_t padding,
                       int64_t dilation) {
    return (size + 2 * padding - (kernel - 1) * dilation - 1) / stride + 1;
  }
  // Before the maximum.
  ImageSize convolved() const {
    return {positions(image.height, kernel.height, stride.height, padding.height, dilation.height),
            positions(image.width, kernel.width, stride.width, padding.width, dilation.width)};
  }
  ImageSize output() const {
    const ImageSize all = convolved();
    return {all.height / window.height, all.width / window.width};
  }
  // Whether a backward pass has to know which pixel of a window the output is, or that it is none of them.
  bool chooses() const { return relu || window.pixels() > 1; }
  // Of one image.
  double multiply_adds() const {
    return static_cast<double>(out_channels * convolved().pixels() * taps());
  }
};
constexpr int64_t kLargestWindow = 255;  // pixels

// "Real" is float64 for float64 and float32 for all others.
struct EnsembleConv2dParams {
  DType dtype;  // of input and output
  int64_t ensemble_size, batch;
  Conv2d conv;
  const void*
      input;  // [B, C, H, W] (member stride 0) or [E, B, C, H, W]; an image lies in one piece
  int64_t input_member_stride, input_image_stride;
  const void* weight;  // Real [E, O, C, kernel height, kernel width], contiguous
  // Forward only, in the place of the weight: rows [E, O] of C x kernel inputs. nullptr: all weights are there.
  const SparseRows* sparse;
  const Int8Weight* int8;  // likewise, of float32 and for ensemble_conv2d_int8_cpu
  const void* bias;        // Real [E, O], contiguous, or nullptr
  void* output;            // [E, B, O, height, width], contiguous
  // For each output which pixel of its window it is, or 255 where the ReLU cut it off: what a backward pass of the
  // same process reads. [E, chosen_images, O, height, width] bytes, or nullptr; how the images of a member lie in it is
  // the instruction set's own.
  uint8_t* chosen;
};
constexpr int64_t kMostLanes = 16;
template <class Int>  // int64_t, or torch's symbolic sizes
Int chosen_images(const Int& batch) {
  return (batch + (kMostLanes - 1)) / kMostLanes * kMostLanes;
}

struct EnsembleConv2dGradients {
  const void* output;   // elements, as the output
  void* input;          // Real [E, B, C, H, W], contiguous; or nullptr
  void *weight, *bias;  // Real, as those; or nullptr
  void* partial;        // partial_bytes, for all threads together
  int threads;          // a hint that changes no bit
};

// The caller splits [0, items) among its threads as it likes and gives each call scratch of its own, 64-byte
// aligned: no split changes a bit of the output.
namespace ensemble_conv2d_cpu {
int64_t work_items(const EnsembleConv2dParams& params);
int64_t grain_size(const EnsembleConv2dParams& params);
size_t scratch_bytes(const EnsembleConv2dParams& params);
void run(const EnsembleConv2dParams& params, int64_t begin, int64_t end, void* scratch);

// A backward pass is two rounds; the second has the members as its items.
struct BackwardPlan {
  int64_t items, grain_size;
  size_t partial_bytes, scratch_bytes;
};
BackwardPlan plan_backward(const EnsembleConv2dParams& params,
                           const EnsembleConv2dGradients& gradients);
void run_backward(const EnsembleConv2dParams& params, const EnsembleConv2dGradients& gradients,
                  int64_t begin, int64_t end, void* scratch);
void finish_backward(const EnsembleConv2dParams& params, const EnsembleConv2dGradients& gradients,
                     int64_t begin, int64_t end);
}  // namespace ensemble_conv2d_cpu

// On weights in bytes. All outputs of an image with a NaN are NaN.
namespace ensemble_conv2d_int8_cpu {
int64_t work_items(const EnsembleConv2dParams& params);
int64_t grain_size(const EnsembleConv2dParams& params);
size_t scratch_bytes(const EnsembleConv2dParams& params);
void run(const EnsembleConv2dParams& params, int64_t begin, int64_t end, void* scratch);
}  // namespace ensemble_conv2d_int8_cpu

}  // namespace pyens
