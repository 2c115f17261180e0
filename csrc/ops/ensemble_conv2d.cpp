// The convolution of every member of an ensemble, with a ReLU and the maximum of windows.
//
//   ensemble_conv2d           the outputs
//   ensemble_conv2d_choosing  and which pixel of its window each of them is, which a backward pass reads
//   ensemble_conv2d_backward  the gradients of those tensors that need one: [input, weight, bias]
//   ensemble_conv2d_sparse    the outputs, of weights of which few are kept
//   ensemble_conv2d_int8      the outputs, of weights in bytes
//
// A kernel of its own on the CPU. Elsewhere, and for second derivatives, it is composed of torch's operations: the
// members are groups of one convolution.

#include "ops/torch.h"

#include <vector>

#include "kernels/ensemble_conv2d.h"
#include "ops/checks.h"
#include "ops/int8.h"
#include "ops/launch.h"
#include "ops/operation.h"
#include "ops/sparse_rows.h"

namespace pyens {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using NeedsGrad = c10::List<bool>;

constexpr char kOp[] = "ensemble_conv2d";
constexpr char kChoosing[] = "ensemble_conv2d_choosing";
constexpr char kBackward[] = "ensemble_conv2d_backward";
constexpr char kSparse[] = "ensemble_conv2d_sparse";
constexpr char kInt8[] = "ensemble_conv2d_int8";

// --- arguments -------------------------------------------------------------------------------------

ImageSize parse_size(const char* op, const char* argument, IntArrayRef sizes, int64_t least) {
  constexpr int64_t kMost = int64_t{1} << 31;
  PYENS_CHECK_VALUE(sizes.size() == 2, op, argument, "two integers", sizes.size());
  for (const int64_t size : sizes) {
    PYENS_CHECK_VALUE(size >= least && size < kMost, op, argument,
                      c10::str("from ", least, " to ", kMost - 1), size);
  }
  return {sizes[0], sizes[1]};
}

// All but the sizes of tensors.
Conv2d parse_conv(const char* op, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                  std::string_view activation, IntArrayRef max_pool) {
  Conv2d conv{};
  conv.stride = parse_size(op, "stride", stride, 1);
  conv.padding = parse_size(op, "padding", padding, 0);
  conv.dilation = parse_size(op, "dilation", dilation, 1);
  conv.window = parse_size(op, "max_pool", max_pool, 1);
  PYENS_CHECK_VALUE(conv.window.height <= kLargestWindow && conv.window.width <= kLargestWindow &&
                        conv.window.pixels() <= kLargestWindow,
                    op, "max_pool", c10::str("a window of up to ", kLargestWindow, " pixels"),
                    conv.window.height, " x ", conv.window.width);
  PYENS_CHECK_VALUE(activation == "relu" || activation == "identity", op, "activation",
                    "relu or identity", '"', activation, '"');
  conv.relu = activation == "relu";
  return conv;
}

struct OutputSize {
  SymInt height, width;
};

OutputSize check_conv2d(const char* op, const Conv2d& conv, const Tensor& input,
                        const Tensor& weight, const OptionalTensor& bias) {
  PYENS_CHECK_TYPE(is_kernel_dtype(weight.scalar_type()), op, "weight",
                   "float32, float64, bfloat16 or float16", weight.scalar_type());
  PYENS_CHECK_VALUE(weight.dim() == 5 && weight.sym_numel() >= 1, op, "weight",
                    "[E, O, C, height, width], none of them 0", "shape ", weight.sym_sizes());
  const SymInt &members = weight.sym_size(0), &channels = weight.sym_size(2);
  check_same_kind(op, {"input"}, input, {"weight"}, weight);
  const int64_t dim = input.dim();
  PYENS_CHECK_VALUE(
      (dim == 4 || (dim == 5 && input.sym_size(0) == members)) && input.sym_size(-3) == channels,
      op, "input",
      c10::str("[B, ", channels, ", H, W] or [", members, ", B, ", channels, ", H, W]"), "shape ",
      input.sym_sizes());
  if (bias) {
    check_same_kind(op, {"bias"}, *bias, {"weight"}, weight);
    PYENS_CHECK_VALUE(
        bias->dim() == 2 && bias->sym_size(0) == members && bias->sym_size(1) == weight.sym_size(1),
        op, "bias", c10::str("[", members, ", ", weight.sym_size(1), "]"), "shape ",
        bias->sym_sizes());
  }
  const auto along = [&](int64_t axis, int64_t stride, int64_t padding, int64_t dilation,
                         int64_t window) -> SymInt {
    const SymInt size = input.sym_size(axis), kernel = weight.sym_size(axis);
    const SymInt reach = (kernel - 1) * dilation + 1;
    PYENS_CHECK_VALUE(size >= 1 && size + 2 * padding >= reach, op, "input",
                      c10::str("an image that a kernel of ", kernel, " with dilation ", dilation,
                               " fits into, padded by ", padding),
                      "shape ", input.sym_sizes());
    const SymInt all = Conv2d::positions(size, kernel, stride, padding, dilation);
    PYENS_CHECK_VALUE(all >= window, op, "max_pool",
                      c10::str("a window that the ", all, " outputs of the convolution hold"),
                      window, " for an input of shape ", input.sym_sizes());
    return all / window;
  };
  return {
      along(-2, conv.stride.height, conv.padding.height, conv.dilation.height, conv.window.height),
      along(-1, conv.stride.width, conv.padding.width, conv.dilation.width, conv.window.width)};
}

Tensor output_like(const Tensor& input, const Tensor& weight, const OutputSize& size) {
  return empty_result_symint(
      {weight.sym_size(0), input.sym_size(-4), weight.sym_size(1), size.height, size.width},
      input.options());
}

// [E, images, O, height, width]; none where every output is a sum. The same on every processor, because compiled code
// may outlive its process.
c10::SymDimVector chosen_shape(const Conv2d& conv, const Tensor& input, const Tensor& weight,
                               const OutputSize& size) {
  if (!conv.chooses()) return {0};
  return {weight.sym_size(0), chosen_images(input.sym_size(-4)), weight.sym_size(1), size.height,
          size.width};
}

Tensor chosen_like(const Conv2d& conv, const Tensor& input, const Tensor& weight,
                   const OutputSize& size) {
  return empty_result_symint(chosen_shape(conv, input, weight, size),
                             input.options().dtype(at::kByte));
}

// --- the kernel --------------------------------------------------------------------------------------

// An image in one piece; members that share images keep a stride of 0.
Tensor with_whole_images(const Tensor& input) {
  int64_t expected = 1;
  for (int64_t axis = -1; axis >= -3; --axis) {
    if (input.size(axis) > 1 && input.stride(axis) != expected) return input.contiguous();
    expected *= input.size(axis);
  }
  return input;
}

struct Conv2dCall {
  EnsembleConv2dParams params{};
  Tensor input, weight, bias;  // what the kernel reads

  // `sizes_alone`: of the weight nothing else is asked for.
  Conv2dCall(Conv2d conv, const Tensor& given, const Tensor& given_weight,
             const OptionalTensor& given_bias, bool sizes_alone = false) {
    const at::ScalarType real = accumulation_type(given.scalar_type());
    input = with_whole_images(given);
    weight = sizes_alone ? given_weight : given_weight.to(real).contiguous();
    conv.channels = weight.size(2);
    conv.out_channels = weight.size(1);
    conv.kernel = {weight.size(3), weight.size(4)};
    conv.image = {input.size(-2), input.size(-1)};
    params.dtype = kernel_dtype(input.scalar_type());
    params.ensemble_size = weight.size(0);
    params.batch = input.size(-4);
    params.conv = conv;
    params.input = input.const_data_ptr();
    params.input_member_stride = input.dim() == 5 ? input.stride(0) : 0;
    params.input_image_stride = input.stride(-4);
    params.weight = weight.const_data_ptr();
    if (!given_bias) return;
    bias = given_bias->to(real).contiguous();
    params.bias = bias.const_data_ptr();
  }
};

void run(EnsembleConv2dParams& p, Tensor& output) {
  p.output = output.mutable_data_ptr();
  launch_cpu(ensemble_conv2d_cpu::work_items(p), ensemble_conv2d_cpu::grain_size(p),
             ensemble_conv2d_cpu::scratch_bytes(p), [&](int64_t begin, int64_t end, void* scratch) {
               ensemble_conv2d_cpu::run(p, begin, end, scratch);
             });
}

Tensor run(const Conv2d& conv, const Tensor& input, const Tensor& weight,
           const OptionalTensor& bias, const OutputSize& size, const Tensor& chosen) {
  Tensor output = output_like(input, weight, size);
  if (output.numel() == 0) return output;
  Conv2dCall call(conv, input, weight, bias);
  if (chosen.defined() && chosen.numel() > 0) {
    call.params.chosen = chosen.mutable_data_ptr<uint8_t>();
  }
  run(call.params, output);
  return output;
}

Tensor ensemble_conv2d(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       std::string_view activation, IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kOp, stride, padding, dilation, activation, max_pool);
  const OutputSize size = check_conv2d(kOp, conv, input, weight, bias);
  return run(conv, input, weight, bias, size, {});
}

Tensor ensemble_conv2d_meta(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                            std::string_view activation, IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kOp, stride, padding, dilation, activation, max_pool);
  return output_like(input, weight, check_conv2d(kOp, conv, input, weight, bias));
}

std::tuple<Tensor, Tensor> ensemble_conv2d_choosing(const Tensor& input, const Tensor& weight,
                                                    const OptionalTensor& bias, IntArrayRef stride,
                                                    IntArrayRef padding, IntArrayRef dilation,
                                                    std::string_view activation,
                                                    IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kOp, stride, padding, dilation, activation, max_pool);
  const OutputSize size = check_conv2d(kOp, conv, input, weight, bias);
  const Tensor chosen = chosen_like(conv, input, weight, size);
  // What no image has a place in is the same in every call.
  if (input.size(-4) % kMostLanes != 0) chosen.zero_();
  return {run(conv, input, weight, bias, size, chosen), chosen};
}

std::tuple<Tensor, Tensor> ensemble_conv2d_choosing_meta(
    const Tensor& input, const Tensor& weight, const OptionalTensor& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, std::string_view activation, IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kOp, stride, padding, dilation, activation, max_pool);
  const OutputSize size = check_conv2d(kOp, conv, input, weight, bias);
  return {output_like(input, weight, size), chosen_like(conv, input, weight, size)};
}

// --- sparse weights ------------------------------------------------------------------------------------

// [E, O, C, height, width] of the weight's type and device, without its memory.
Tensor shape_of(const SparseWeight& w, IntArrayRef kernel) {
  return at::empty({1}, w.values.options())
      .expand_symint({w.members(), w.rows(), kernel[0], kernel[1], kernel[2]});
}

SparseWeight check_sparse(const Tensor& values, const Tensor& columns, const Tensor& starts,
                          const Tensor& order, IntArrayRef kernel) {
  PYENS_CHECK_VALUE(kernel.size() == 3 && kernel[0] >= 1 && kernel[1] >= 1 && kernel[2] >= 1 &&
                        kernel[0] < (1 << 20) && kernel[1] < (1 << 20) && kernel[2] < (1 << 20),
                    kSparse, "kernel", "[channels, height, width], none of them 0", kernel);
  const SparseWeight w{values, columns, starts, order, kernel[0] * kernel[1] * kernel[2]};
  check_sparse_shape(kSparse, w);
  return w;
}

Tensor ensemble_conv2d_sparse(const Tensor& input, const Tensor& values, const Tensor& columns,
                              const Tensor& starts, const Tensor& order, IntArrayRef kernel,
                              const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                              IntArrayRef dilation, std::string_view activation,
                              IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kSparse, stride, padding, dilation, activation, max_pool);
  const Tensor v = values.contiguous(), c = columns.contiguous(), s = starts.contiguous(),
               o = order.contiguous();
  const SparseWeight w = check_sparse(v, c, s, o, kernel);
  const Tensor weight = shape_of(w, kernel);
  Tensor output = output_like(input, weight, check_conv2d(kSparse, conv, input, weight, bias));
  const SparseRows rows = checked_rows(kSparse, w);
  if (output.numel() == 0) return output;
  Conv2dCall call(conv, input, weight, bias, /*sizes_alone=*/true);
  call.params.sparse = &rows;
  run(call.params, output);
  return output;
}

Tensor ensemble_conv2d_sparse_meta(const Tensor& input, const Tensor& values, const Tensor& columns,
                                   const Tensor& starts, const Tensor& order, IntArrayRef kernel,
                                   const OptionalTensor& bias, IntArrayRef stride,
                                   IntArrayRef padding, IntArrayRef dilation,
                                   std::string_view activation, IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kSparse, stride, padding, dilation, activation, max_pool);
  const Tensor weight = shape_of(check_sparse(values, columns, starts, order, kernel), kernel);
  return output_like(input, weight, check_conv2d(kSparse, conv, input, weight, bias));
}

// --- weights in bytes ----------------------------------------------------------------------------------

// [E, O, C, height, width] of float32, without its memory.
Tensor check_int8_weight(const Int8Tensors& w) {
  check_int8(kInt8, w, 5, "[E, O, C, height, width]");
  return at::empty({1}, w.scale.options()).expand_symint(w.values.sym_sizes());
}

Tensor ensemble_conv2d_int8(const Tensor& input, const Tensor& values, const Tensor& scale,
                            const Tensor& offset, const Tensor& input_scale,
                            const Tensor& input_zero_point, const OptionalTensor& bias,
                            IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                            std::string_view activation, IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kInt8, stride, padding, dilation, activation, max_pool);
  const Tensor v = values.contiguous(), s = scale.contiguous(), o = offset.contiguous(),
               of_input = input_scale.contiguous(), zero = input_zero_point.contiguous();
  const Int8Tensors tensors{v, s, o, of_input, zero};
  const Tensor weight = check_int8_weight(tensors);
  Tensor output = output_like(input, weight, check_conv2d(kInt8, conv, input, weight, bias));
  if (output.numel() == 0) return output;
  Conv2dCall call(conv, input, weight, bias, /*sizes_alone=*/true);
  const Int8Weight bytes = int8_weight(tensors);
  EnsembleConv2dParams& p = call.params;
  p.int8 = &bytes;
  p.output = output.mutable_data_ptr();
  launch_cpu(ensemble_conv2d_int8_cpu::work_items(p), ensemble_conv2d_int8_cpu::grain_size(p),
             ensemble_conv2d_int8_cpu::scratch_bytes(p),
             [&](int64_t begin, int64_t end, void* scratch) {
               ensemble_conv2d_int8_cpu::run(p, begin, end, scratch);
             });
  return output;
}

Tensor ensemble_conv2d_int8_meta(const Tensor& input, const Tensor& values, const Tensor& scale,
                                 const Tensor& offset, const Tensor& input_scale,
                                 const Tensor& input_zero_point, const OptionalTensor& bias,
                                 IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                 std::string_view activation, IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kInt8, stride, padding, dilation, activation, max_pool);
  const Tensor weight = check_int8_weight({values, scale, offset, input_scale, input_zero_point});
  return output_like(input, weight, check_conv2d(kInt8, conv, input, weight, bias));
}

// Under autocast both compute in the dtype of their weights.
Tensor ensemble_conv2d_sparse_autocast(const Tensor& input, const Tensor& values,
                                       const Tensor& columns, const Tensor& starts,
                                       const Tensor& order, IntArrayRef kernel,
                                       const OptionalTensor& bias, IntArrayRef stride,
                                       IntArrayRef padding, IntArrayRef dilation,
                                       std::string_view activation, IntArrayRef max_pool) {
  const Autocast cast(input);
  const Tensor x = input.is_floating_point() ? input.to(values.scalar_type()) : input;
  return call<ensemble_conv2d_sparse, kSparse>(x, values, columns, starts, order, kernel, bias,
                                               stride, padding, dilation, activation, max_pool);
}

Tensor ensemble_conv2d_int8_autocast(const Tensor& input, const Tensor& values, const Tensor& scale,
                                     const Tensor& offset, const Tensor& input_scale,
                                     const Tensor& input_zero_point, const OptionalTensor& bias,
                                     IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                     std::string_view activation, IntArrayRef max_pool) {
  const Autocast cast(input);
  return call<ensemble_conv2d_int8, kInt8>(cast.float32(input), values, scale, offset, input_scale,
                                           input_zero_point, bias, stride, padding, dilation,
                                           activation, max_pool);
}

// --- backward ----------------------------------------------------------------------------------------

void check_backward(const Conv2d& conv, const Tensor& grad, const Tensor& input,
                    const Tensor& weight, const Tensor& chosen, const NeedsGrad& needs_grad) {
  const OutputSize size = check_conv2d(kOp, conv, input, weight, std::nullopt);
  check_same_kind(kOp, {"grad"}, grad, {"weight"}, weight);
  const SymInt expected[] = {weight.sym_size(0), input.sym_size(-4), weight.sym_size(1),
                             size.height, size.width};
  PYENS_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(expected), kOp, "grad",
                    c10::str("shape ", c10::SymIntArrayRef(expected)), "shape ", grad.sym_sizes());
  PYENS_CHECK_VALUE(needs_grad.size() == 3, kOp, "needs_grad", "3 of them", needs_grad.size());
  const auto shape = chosen_shape(conv, input, weight, size);
  PYENS_CHECK_VALUE(chosen.scalar_type() == at::kByte &&
                        chosen.sym_sizes() == c10::SymIntArrayRef(shape) &&
                        chosen.is_contiguous() && chosen.device() == input.device(),
                    kOp, "chosen", "what ensemble_conv2d_choosing gives", chosen.scalar_type(),
                    " of shape ", chosen.sym_sizes());
}

std::vector<Tensor> ensemble_conv2d_backward(const Tensor& grad, const Tensor& input,
                                             const Tensor& weight, const Tensor& chosen,
                                             IntArrayRef stride, IntArrayRef padding,
                                             IntArrayRef dilation, std::string_view activation,
                                             IntArrayRef max_pool, NeedsGrad needs_grad) {
  const Conv2d conv = parse_conv(kOp, stride, padding, dilation, activation, max_pool);
  check_backward(conv, grad, input, weight, chosen, needs_grad);
  const at::ScalarType dtype = input.scalar_type();
  const auto real = input.options().dtype(accumulation_type(dtype));
  const int64_t members = weight.size(0), batch = input.size(-4);
  std::vector<Tensor> gradients;
  const auto ask = [&](bool needed, IntArrayRef shape) {
    if (needed) gradients.push_back(empty_result(shape, real));
    return needed ? gradients.back() : Tensor();
  };
  const Tensor of_input =
      ask(needs_grad[0], {members, batch, input.size(-3), input.size(-2), input.size(-1)});
  const Tensor of_weight = ask(needs_grad[1], weight.sizes());
  const Tensor of_bias = ask(needs_grad[2], {members, weight.size(1)});
  if (grad.numel() == 0) {
    for (Tensor& gradient : gradients) gradient.zero_();
  } else if (!gradients.empty()) {
    Conv2dCall call(conv, input, weight, std::nullopt);
    EnsembleConv2dParams& p = call.params;
    // Only read.
    if (chosen.numel() > 0) p.chosen = const_cast<uint8_t*>(chosen.const_data_ptr<uint8_t>());
    const Tensor given = grad.contiguous();
    const auto data = [](const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; };
    EnsembleConv2dGradients g{};
    g.output = given.const_data_ptr();
    g.input = data(of_input);
    g.weight = data(of_weight);
    g.bias = data(of_bias);
    g.threads = at::get_num_threads();
    const auto plan = ensemble_conv2d_cpu::plan_backward(p, g);
    const Tensor partial =
        empty_result({static_cast<int64_t>(plan.partial_bytes)}, input.options().dtype(at::kByte));
    g.partial = partial.mutable_data_ptr();
    launch_cpu(plan.items, plan.grain_size, plan.scratch_bytes,
               [&](int64_t begin, int64_t end, void* scratch) {
                 ensemble_conv2d_cpu::run_backward(p, g, begin, end, scratch);
               });
    launch_cpu(plan.partial_bytes > 0 ? members : 0, 1, 0,
               [&](int64_t begin, int64_t end, void* /*scratch*/) {
                 ensemble_conv2d_cpu::finish_backward(p, g, begin, end);
               });
  }
  // Images that all members share: one member after the other, the same sum for any number of threads.
  if (needs_grad[0] && input.dim() == 4) {
    Tensor sum = members == 1 ? of_input[0] : of_input[0] + of_input[1];
    for (int64_t m = 2; m < members; ++m) sum += of_input[m];
    gradients[0] = sum;
  }
  for (Tensor& gradient : gradients) gradient = gradient.to(dtype);
  return gradients;
}

std::vector<Tensor> ensemble_conv2d_backward_meta(const Tensor& grad, const Tensor& input,
                                                  const Tensor& weight, const Tensor& chosen,
                                                  IntArrayRef stride, IntArrayRef padding,
                                                  IntArrayRef dilation, std::string_view activation,
                                                  IntArrayRef max_pool, NeedsGrad needs_grad) {
  const Conv2d conv = parse_conv(kOp, stride, padding, dilation, activation, max_pool);
  check_backward(conv, grad, input, weight, chosen, needs_grad);
  std::vector<Tensor> gradients;
  if (needs_grad[0]) gradients.push_back(at::empty_symint(input.sym_sizes(), input.options()));
  if (needs_grad[1]) gradients.push_back(at::empty_symint(weight.sym_sizes(), input.options()));
  if (needs_grad[2]) {
    gradients.push_back(
        at::empty_symint({weight.sym_size(0), weight.sym_size(1)}, input.options()));
  }
  return gradients;
}

// --- composed of torch's operations --------------------------------------------------------------------

// The ensemble as one convolution: [B, C, H, W] where all members share the images, or the members' channels one after
// the other, in groups.
struct Grouped {
  Tensor input, weight;
  int64_t groups;

  Grouped(const Tensor& given, const Tensor& given_weight)
      : input(given.dim() == 4 ? given : beside(given)),
        weight(joined(given_weight)),
        groups(given.dim() == 4 ? 1 : given_weight.size(0)) {}

  // [E, O, ...] to [E O, ...]. (Of view and reshape an older vmap has rules, of flatten none.)
  static Tensor joined(const Tensor& t) {
    c10::SymDimVector sizes(t.sym_sizes().begin() + 1, t.sym_sizes().end());
    sizes[0] = sizes[0] * t.sym_size(0);
    return t.reshape_symint(sizes);
  }
  // [E O, ...] to [E, O, ...].
  static Tensor split(const Tensor& t, const c10::SymInt& members) {
    c10::SymDimVector sizes(t.sym_sizes().begin(), t.sym_sizes().end());
    sizes[0] = sizes[0] / members;
    sizes.insert(sizes.begin(), members);
    return t.reshape_symint(sizes);
  }
  // [E, B, O, ...] to [B, E O, ...], and back.
  static Tensor beside(const Tensor& t) {
    const Tensor batch_first = t.transpose(0, 1);
    c10::SymDimVector sizes(batch_first.sym_sizes().begin(), batch_first.sym_sizes().end());
    sizes.erase(sizes.begin() + 1);
    sizes[1] = sizes[1] * t.sym_size(0);
    return batch_first.reshape_symint(sizes);
  }
  static Tensor apart(const Tensor& t, const c10::SymInt& members) {
    c10::SymDimVector sizes(t.sym_sizes().begin(), t.sym_sizes().end());
    sizes[1] = sizes[1] / members;
    sizes.insert(sizes.begin() + 1, members);
    return t.reshape_symint(sizes).transpose(0, 1);
  }
};

Tensor composed(const Tensor& input, const Tensor& weight, const OptionalTensor& bias,
                IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                std::string_view activation, IntArrayRef max_pool) {
  const Conv2d conv = parse_conv(kOp, stride, padding, dilation, activation, max_pool);
  check_conv2d(kOp, conv, input, weight, bias);
  const Grouped one(input, weight);
  const OptionalTensor flat = bias ? OptionalTensor(Grouped::joined(*bias)) : std::nullopt;
  Tensor output = at::conv2d(one.input, one.weight, flat, stride, padding, dilation, one.groups);
  if (conv.relu) output = at::relu(output);
  if (conv.window.pixels() > 1) output = at::max_pool2d(output, max_pool, max_pool);
  return Grouped::apart(output, weight.sym_size(0)).contiguous();
}

// Differentiable itself.
std::vector<Tensor> composed_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                      const OptionalTensor& bias, const Conv2d& conv,
                                      IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                                      IntArrayRef max_pool, const NeedsGrad& needs_grad) {
  const Grouped one(input, weight);
  Tensor g = Grouped::beside(grad);
  if (conv.chooses()) {
    // Where it flows does not depend on what has a derivative.
    at::NoGradGuard no_grad;
    const OptionalTensor flat = bias ? OptionalTensor(Grouped::joined(*bias)) : std::nullopt;
    const Tensor sums =
        at::conv2d(one.input, one.weight, flat, stride, padding, dilation, one.groups);
    Tensor best = sums, indices;
    if (conv.window.pixels() > 1) {
      std::tie(best, indices) = at::max_pool2d_with_indices(sums, max_pool, max_pool);
    }
    const Tensor cut = best <= 0;
    at::AutoGradMode with_grad(true);
    if (conv.relu) g = at::where(cut, at::zeros({}, g.options()), g);
    if (indices.defined()) {
      g = at::max_pool2d_with_indices_backward(g, sums, max_pool, max_pool, {0, 0}, {1, 1}, false,
                                               indices);
    }
  }
  at::OptionalIntArrayRef bias_sizes;
  const int64_t outputs[] = {weight.size(0) * weight.size(1)};
  bias_sizes = IntArrayRef(outputs);
  auto [of_input, of_weight, of_bias] = at::convolution_backward(
      g, one.input, one.weight, bias_sizes, stride, padding, dilation, false, {0, 0}, one.groups,
      {needs_grad[0], needs_grad[1], needs_grad[2]});
  std::vector<Tensor> gradients;
  const SymInt members = weight.sym_size(0);
  if (needs_grad[0]) {
    gradients.push_back(input.dim() == 5 ? Grouped::apart(of_input, members) : of_input);
  }
  if (needs_grad[1]) gradients.push_back(Grouped::split(of_weight, members));
  if (needs_grad[2]) gradients.push_back(Grouped::split(of_bias, members));
  return gradients;
}

// --- autograd ------------------------------------------------------------------------------------------

class EnsembleConv2dFunction : public torch::autograd::Function<EnsembleConv2dFunction> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                        const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                        IntArrayRef dilation, std::string_view activation, IntArrayRef max_pool) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, chosen] = call<ensemble_conv2d_choosing, kChoosing>(
        input, weight, bias, stride, padding, dilation, activation, max_pool);
    ctx->save_for_backward({input, weight, tensor_or_undefined(bias), chosen});
    ctx->saved_data["stride"] = stride.vec();
    ctx->saved_data["padding"] = padding.vec();
    ctx->saved_data["dilation"] = dilation.vec();
    ctx->saved_data["activation"] = std::string(activation);
    ctx->saved_data["max_pool"] = max_pool.vec();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    SavedTensors saved(ctx);
    const Tensor &input = saved.next(), &weight = saved.next();
    const OptionalTensor bias = if_defined(saved.next());
    const Tensor& chosen = saved.next();
    const auto stride = ctx->saved_data["stride"].toIntVector(),
               padding = ctx->saved_data["padding"].toIntVector(),
               dilation = ctx->saved_data["dilation"].toIntVector(),
               max_pool = ctx->saved_data["max_pool"].toIntVector();
    const std::string& activation = ctx->saved_data["activation"].toStringRef();
    NeedsGrad needs_grad;
    for (size_t i = 0; i < 3; ++i) {
      needs_grad.push_back((i < 2 || bias) && ctx->needs_input_grad(i));
    }
    const auto gradients =
        at::GradMode::is_enabled() || is_batched(grads[0])  // create_graph, or within vmap
            ? composed_backward(grads[0], input, weight, bias,
                                parse_conv(kOp, stride, padding, dilation, activation, max_pool),
                                stride, padding, dilation, max_pool, needs_grad)
            : call<ensemble_conv2d_backward, kBackward>(grads[0], input, weight, chosen, stride,
                                                        padding, dilation, activation, max_pool,
                                                        needs_grad);
    variable_list all(8);
    for (size_t i = 0, next = 0; i < 3; ++i) {
      if (needs_grad[i]) all[i] = gradients[next++];
    }
    return all;
  }
};

Tensor ensemble_conv2d_autograd(const Tensor& input, const Tensor& weight,
                                const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                                IntArrayRef dilation, std::string_view activation,
                                IntArrayRef max_pool) {
  if (!input.is_cpu() && !input.is_meta()) {
    return composed(input, weight, bias, stride, padding, dilation, activation, max_pool);
  }
  const bool needed =
      at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()));
  if (needed) {
    return EnsembleConv2dFunction::apply(input, weight, bias, stride, padding, dilation, activation,
                                         max_pool);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call<ensemble_conv2d, kOp>(input, weight, bias, stride, padding, dilation, activation,
                                    max_pool);
}

Tensor ensemble_conv2d_autocast(const Tensor& input, const Tensor& weight,
                                const OptionalTensor& bias, IntArrayRef stride, IntArrayRef padding,
                                IntArrayRef dilation, std::string_view activation,
                                IntArrayRef max_pool) {
  const Autocast cast(input);
  const OptionalTensor low = bias ? OptionalTensor(cast.lower(*bias)) : std::nullopt;
  return call<ensemble_conv2d, kOp>(cast.lower(input), cast.lower(weight), low, stride, padding,
                                    dilation, activation, max_pool);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(pyens, m) {
  const std::string options =
      ", int[2] stride, int[2] padding, int[2] dilation, str activation, int[2] max_pool";
  Operation(m,
            "ensemble_conv2d(Tensor input, Tensor weight, Tensor? bias" + options + ") -> Tensor")
      .cpu<ensemble_conv2d>()
      .cuda<composed>()
      .meta<ensemble_conv2d_meta>()
      .autograd<ensemble_conv2d_autograd>()
      .autocast<ensemble_conv2d_autocast>();
  Operation(m,
            "ensemble_conv2d_sparse(Tensor input, Tensor values, Tensor columns, Tensor starts,"
            " Tensor order, int[] kernel, Tensor? bias" +
                options + ") -> Tensor")
      .cpu<ensemble_conv2d_sparse>()
      .meta<ensemble_conv2d_sparse_meta>()
      .autocast<ensemble_conv2d_sparse_autocast>()
      .not_differentiable();
  Operation(m,
            "ensemble_conv2d_int8(Tensor input, Tensor values, Tensor scale, Tensor offset,"
            " Tensor input_scale, Tensor input_zero_point, Tensor? bias" +
                options + ") -> Tensor")
      .cpu<ensemble_conv2d_int8>()
      .meta<ensemble_conv2d_int8_meta>()
      .autocast<ensemble_conv2d_int8_autocast>()
      .not_differentiable();
  Operation(m, "ensemble_conv2d_choosing(Tensor input, Tensor weight, Tensor? bias" + options +
                   ") -> (Tensor output, Tensor chosen)")
      .cpu<ensemble_conv2d_choosing>()
      .meta<ensemble_conv2d_choosing_meta>()
      .not_differentiable();
  Operation(m, "ensemble_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor chosen" +
                   options + ", bool[] needs_grad) -> Tensor[]")
      .cpu<ensemble_conv2d_backward>()
      .meta<ensemble_conv2d_backward_meta>()
      .not_differentiable();
}

}  // namespace pyens
