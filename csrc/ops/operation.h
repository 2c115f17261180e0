// How an operation says itself to torch's dispatcher, and how others call it.
//
//   TORCH_LIBRARY_FRAGMENT(pyens, m) {
//     Operation(m, "mask_channels(Tensor input, Tensor masks, Tensor? index) -> Tensor")
//         .cpu_and_cuda<mask_channels>()
//         .meta<mask_channels_meta>()
//         .autograd<mask_channels_autograd>();
//   }
//
// The dispatcher takes arguments one by one. Here those that belong together are one struct of options,
// the first parameter of a function; its schema lists them last. `Flat` stands between the two.
#pragma once

#include "ops/torch.h"

#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "ops/handle.h"
#include "ops/options.h"

namespace pyens {

// --- definition ----------------------------------------------------------------------------------

// The function that the dispatcher calls for `f`.
template <auto f, class F = std::remove_pointer_t<decltype(f)>>
struct Flat {
  static constexpr auto function = f;
};
template <auto f, class R, class Options, class... A>
struct Flat<f, R(const Options&, A...)> {
  template <class... O>
  static R unpacked(A... arguments, O... options) {
    return f(Options{options...}, std::forward<A>(arguments)...);
  }
  template <class... O>
  static constexpr auto choose(std::tuple<O...>*) {
    return &unpacked<O...>;
  }
  static constexpr auto choose(void*) { return f; }
  static constexpr auto function = choose(static_cast<FlatArguments<Options>*>(nullptr));
};

class Operation {
 public:
  Operation(torch::Library& library, const std::string& schema)
      : library_(library), name_(schema.substr(0, schema.find('('))) {
    library.def(schema.c_str());
  }

  template <auto f>
  Operation& cpu() {
    return add(c10::DispatchKey::CPU, Flat<f>::function);
  }
  template <auto f>
  Operation& cuda() {
    return add(c10::DispatchKey::CUDA, Flat<f>::function);
  }
  template <auto f>
  Operation& cpu_and_cuda() {
    return cpu<f>().template cuda<f>();
  }
  // Shapes and dtypes of the results, for fake tensors.
  template <auto f>
  Operation& meta() {
    return add(c10::DispatchKey::Meta, Flat<f>::function);
  }
  template <auto f>
  Operation& autograd() {
    return add(c10::DispatchKey::Autograd, Flat<f>::function);
  }
  // Without this, an operation that has no derivative returns zero gradients and a warning.
  Operation& not_differentiable() {
    return add(c10::DispatchKey::Autograd, torch::autograd::autogradNotImplementedFallback());
  }
  // It changes tensors that require a gradient, as an optimizer does, and counts their versions itself.
  Operation& in_place() {
    library_.impl(name_.c_str(), c10::DispatchKey::Autograd, torch::CppFunction::makeFallthrough());
    return *this;
  }
  template <auto f>
  Operation& autocast() {
    add(c10::DispatchKey::AutocastCPU, Flat<f>::function);
    return add(c10::DispatchKey::AutocastCUDA, Flat<f>::function);
  }

 private:
  template <class F>
  Operation& add(c10::DispatchKey key, F&& function) {
    library_.impl(name_.c_str(), torch::dispatch(key, std::forward<F>(function)));
    return *this;
  }

  torch::Library& library_;
  std::string name_;
};

// --- calls ---------------------------------------------------------------------------------------

template <auto f, const char* name>
const auto& handle() {
  static const Handle<std::remove_pointer_t<decltype(Flat<f>::function)>> looked_up(name);
  return looked_up;
}

// Calls the dispatcher's operation of that name. (A template argument, so that each has a handle of its
// own: `constexpr char kOp[] = "..."`.)
template <auto f, const char* name, class... A>
auto call(A&&... arguments) {
  return handle<f, name>()(std::forward<A>(arguments)...);
}

// The same with the options of a struct in the place of its last arguments.
template <auto f, const char* name, class Options, class... A>
auto call_with(const Options& options, A&&... arguments) {
  return std::apply(
      [&](const auto&... o) { return handle<f, name>()(std::forward<A>(arguments)..., o...); },
      options.fields());
}

// --- autograd ------------------------------------------------------------------------------------

inline at::Tensor tensor_or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(at::Tensor());
}
inline OptionalTensor if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Within vmap, or the older one of `is_grads_batched`: only torch's own operations have rules for that.
inline bool is_batched(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet batched(
      {c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::Batched});
  return tensor.key_set().has_any(batched);
}

// Reads tensors that were saved for backward in the order in which they were listed.
class SavedTensors {
 public:
  explicit SavedTensors(torch::autograd::AutogradContext* ctx)
      : tensors_(ctx->get_saved_variables()) {}
  const at::Tensor& next() { return tensors_[at_++]; }
  at::TensorList next(size_t count) {
    at_ += count;
    return at::TensorList(tensors_).slice(at_ - count, count);
  }
  at::TensorList rest() { return next(tensors_.size() - at_); }

 private:
  torch::autograd::variable_list tensors_;
  size_t at_ = 0;
};

// Saves options for backward: tensors at the end of `tensors`, the others in the context.
template <class Options>
void save_options(torch::autograd::AutogradContext* ctx, const Options& options,
                  torch::autograd::variable_list& tensors) {
  int position = 0;
  const auto save = [&](const auto& option) {
    const std::string key = std::to_string(position++);
    using T = std::decay_t<decltype(option)>;
    if constexpr (std::is_same_v<T, OptionalTensor>) {
      tensors.push_back(tensor_or_undefined(option));
    } else if constexpr (std::is_same_v<T, std::string_view>) {
      ctx->saved_data[key] = std::string(option);
    } else {
      ctx->saved_data[key] = option;
    }
  };
  std::apply([&](const auto&... option) { (save(option), ...); }, options.fields());
}

// What save_options saved. Valid for as long as the context is.
template <class Options>
Options saved_options(torch::autograd::AutogradContext* ctx, SavedTensors& tensors) {
  Options options{};
  int position = 0;
  const auto read = [&](auto& option) {
    const std::string key = std::to_string(position++);
    using T = std::decay_t<decltype(option)>;
    if constexpr (std::is_same_v<T, OptionalTensor>) {
      option = if_defined(tensors.next());
    } else if constexpr (std::is_same_v<T, std::string_view>) {
      option = ctx->saved_data[key].toStringRef();
    } else {
      option = ctx->saved_data[key].template to<T>();
    }
  };
  std::apply([&](auto&... option) { (read(option), ...); }, options.fields());
  return options;
}

// --- autocast ------------------------------------------------------------------------------------

// Within the scope of this object nothing casts by itself; it casts instead, for the device of `like`.
class Autocast {
 public:
  explicit Autocast(const at::Tensor& like)
      : device_(like.device().type()),
        off_(c10::DispatchKeySet({c10::DispatchKey::AutocastCPU, c10::DispatchKey::AutocastCUDA})) {
  }

  // To the dtype of matrix products.
  template <class T>
  auto lower(const T& tensors) const {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device_), tensors, device_);
  }
  template <class T>
  auto float32(const T& tensors) const {
    return at::autocast::cached_cast(at::kFloat, tensors, device_);
  }

 private:
  c10::DeviceType device_;
  c10::impl::ExcludeDispatchKeyGuard off_;
};

}  // namespace pyens
