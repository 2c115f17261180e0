// Options of an operation: one by one for the dispatcher, one struct for everything else.
//
//   #define PYENS_GAIN_OPTIONS(OPTION) OPTION(double, scale, "float scale=1.0")
//   struct GainOptions {
//     PYENS_OPTIONS(PYENS_GAIN_OPTIONS)
//   };
//
// gives the struct a field for each option of the list, references to all of them, and their schema, which
// begins with a comma. Types: bool, std::optional<bool>, int64_t, double, std::string_view, OptionalTensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

namespace pyens {

using OptionalTensor = std::optional<at::Tensor>;

#define PYENS_OPTION_FIELD(type, name, schema) type name{};
#define PYENS_OPTION_TIE(type, name, schema) std::tie(name),
#define PYENS_OPTION_SCHEMA(type, name, schema) ", " schema

// `inner`: a field of the struct that is options too and comes last.
#define PYENS_OPTIONS_AND(LIST, inner)                                   \
  LIST(PYENS_OPTION_FIELD)                                               \
  static constexpr const char* kSchema = LIST(PYENS_OPTION_SCHEMA);      \
  auto fields() { return std::tuple_cat(LIST(PYENS_OPTION_TIE) inner); } \
  auto fields() const { return std::tuple_cat(LIST(PYENS_OPTION_TIE) inner); }
#define PYENS_OPTIONS(LIST) PYENS_OPTIONS_AND(LIST, std::tuple<>())
// The same with `inner` first.
#define PYENS_OPTIONS_AFTER(inner, LIST)                                                 \
  LIST(PYENS_OPTION_FIELD)                                                               \
  static constexpr const char* kSchema = LIST(PYENS_OPTION_SCHEMA);                      \
  auto fields() { return std::tuple_cat(inner, LIST(PYENS_OPTION_TIE) std::tuple<>()); } \
  auto fields() const { return std::tuple_cat(inner, LIST(PYENS_OPTION_TIE) std::tuple<>()); }

// How the dispatcher passes the options of a struct: a tuple of types, or void for what is no such struct.
template <class T>
using FlatArgument =
    std::conditional_t<std::is_same_v<T, OptionalTensor>, const OptionalTensor&, T>;

template <class... T>
std::tuple<FlatArgument<T>...> flat_arguments(std::tuple<T&...>);
template <class Options>
auto flat_arguments(int) -> decltype(flat_arguments(std::declval<Options&>().fields()));
template <class Options>
void flat_arguments(...);

template <class Options>
using FlatArguments = decltype(flat_arguments<Options>(0));

// The signature of an operation: the options of a first parameter `const Options&` one by one, at the end.
template <class F, class = void>
struct FlatSignatureOf {
  using type = F;
};
template <class R, class Options, class... A>
struct FlatSignatureOf<R(const Options&, A...),
                       std::enable_if_t<!std::is_void_v<FlatArguments<Options>>>> {
  template <class... O>
  static auto with(std::tuple<O...>*) -> R (*)(A..., O...);
  using type = std::remove_pointer_t<decltype(with(static_cast<FlatArguments<Options>*>(nullptr)))>;
};
template <class F>
using FlatSignature = typename FlatSignatureOf<F>::type;

}  // namespace pyens
