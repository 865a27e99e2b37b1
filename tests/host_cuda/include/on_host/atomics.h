// Atomics. They take the address of an element of a view (&out[i]), so that they are checked.
#pragma once

#include <type_traits>

#include "memory.h"

namespace on_host {

template <typename T>
struct Same {
  using Type = T;
};
// A parameter that T is not deduced from.
template <typename T>
using Value = typename Same<T>::Type;

template <typename T, typename Change>
T change_atomically(const Address<T>& address, Change change) {
  touch(Access::kAtomic, address.target);
  const T old = *address.data;
  *address.data = change(old);
  return old;
}

}  // namespace on_host

template <typename T>
T atomicAdd(const on_host::Address<T>& address, on_host::Value<T> value) {
  return on_host::change_atomically(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(const on_host::Address<T>& address, on_host::Value<T> value) {
  return on_host::change_atomically(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(const on_host::Address<T>& address, on_host::Value<T> value) {
  return on_host::change_atomically(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(const on_host::Address<T>& address, on_host::Value<T> value) {
  return on_host::change_atomically(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(const on_host::Address<T>& address, on_host::Value<T> compare,
            on_host::Value<T> value) {
  return on_host::change_atomically(address, [=](T old) { return old == compare ? value : old; });
}
