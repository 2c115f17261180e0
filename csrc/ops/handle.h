// An operation of this library to call through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <utility>

namespace pyens {

// Looks the operation up when it is made. The signature is that of its schema.
template <class Signature>
class Handle;
template <class R, class... A>
class Handle<R(A...)> {
 public:
  explicit Handle(const char* name)
      : op_(c10::Dispatcher::singleton()
                .findSchemaOrThrow((std::string("pyens::") + name).c_str(), "")
                .template typed<R(A...)>()) {}
  R operator()(A... arguments) const { return op_.call(std::forward<A>(arguments)...); }

 private:
  c10::TypedOperatorHandle<R(A...)> op_;
};

}  // namespace pyens
