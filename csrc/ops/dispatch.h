// An operation of this library, called through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace pyens {

// Keep what it returns in a static: looking up takes a lock and a hash of the name.
template <class Signature>
auto dispatcher_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace pyens
