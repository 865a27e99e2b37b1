// The views of span.h, checked: bounds, order, initialisation, alignment of vectors, bytes.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "machine.h"

namespace on_host {

// What & of an element gives; the atomics take it.
template <typename T>
struct Address {
  T* data;
  Target target;
};

// An element that may be written. It is read where it is converted; so that no kernel keeps one in
// an `auto` variable and reads it too late, nothing works on an lvalue.
template <typename T>
class Reference {
 public:
  Reference(T* data, const Target& target) : data_(data), target_(target) {}
  Reference(const Reference&) = delete;

  operator T() && {
    touch(Access::kRead, target_);
    return *data_;
  }
  T operator=(T value) && {
    touch(Access::kWrite, target_);
    return *data_ = value;
  }
  T operator=(Reference&& other) && {
    return std::move(*this) = static_cast<T>(std::move(other));
  }
  T operator+=(T value) && { return change([=](T old) { return old + value; }); }
  T operator-=(T value) && { return change([=](T old) { return old - value; }); }
  T operator*=(T value) && { return change([=](T old) { return old * value; }); }
  T operator|=(T value) && { return change([=](T old) { return old | value; }); }
  Address<T> operator&() && { return {data_, target_}; }

 private:
  template <typename Change>
  T change(Change change) {
    touch(Access::kRead, target_);
    touch(Access::kWrite, target_);
    return *data_ = static_cast<T>(change(*data_));
  }

  T* data_;
  Target target_;
};

// `elements` are those from `data` on, or null in global memory.
template <typename T>
inline Target target_of(T* data, int64_t size, const Subscript& at, Element* elements) {
  const auto step = static_cast<int64_t>(sizeof(T)) / kBytesOfElement;
  return {data + at.value, sizeof(T), at.value, size, at.site, std::is_const_v<T>,
          elements == nullptr ? nullptr : elements + at.value * step};
}

template <typename Vector, typename T>
Vector load_vector(const T* data, const Target& target) {
  static_assert(sizeof(Vector) % sizeof(T) == 0, "a vector holds whole elements");
  touch_vector(Access::kRead, target, sizeof(Vector) / sizeof(T), alignof(Vector));
  Vector value;
  std::memcpy(static_cast<void*>(&value), data + target.index, sizeof value);
  return value;
}

template <typename Vector, typename T>
void store_vector(T* data, const Target& target, const Vector& value) {
  static_assert(sizeof(Vector) % sizeof(T) == 0, "a vector holds whole elements");
  touch_vector(Access::kWrite, target, sizeof(Vector) / sizeof(T), alignof(Vector));
  std::memcpy(static_cast<void*>(data + target.index), &value, sizeof value);
}

}  // namespace on_host

namespace rdarts {

template <typename T>
struct Span {
  T* data;
  int64_t size;

  auto operator[](on_host::Subscript at) const {
    const on_host::Target target = on_host::target_of(data, size, at, nullptr);
    if constexpr (std::is_const_v<T>) {
      touch(on_host::Access::kRead, target);
      return std::remove_const_t<T>(data[at.value]);
    } else {
      return on_host::Reference<T>(data + at.value, target);
    }
  }
  template <typename Vector>
  Vector load(on_host::Subscript at) const {
    return on_host::load_vector<Vector>(data, on_host::target_of(data, size, at, nullptr));
  }
  template <typename Vector>
  void store(on_host::Subscript at, Vector value) const {
    on_host::store_vector(data, on_host::target_of(data, size, at, nullptr), value);
  }
};

template <typename T>
struct SharedSpan {
  static_assert(sizeof(T) % on_host::kBytesOfElement == 0, "");
  T* data;
  int size;
  on_host::Element* elements;

  on_host::Reference<T> operator[](on_host::Subscript at) const {
    return {data + at.value, on_host::target_of(data, size, at, elements)};
  }
  template <typename Vector>
  Vector load(on_host::Subscript at) const {
    return on_host::load_vector<Vector>(data, on_host::target_of(data, size, at, elements));
  }
  template <typename Vector>
  void store(on_host::Subscript at, Vector value) const {
    on_host::store_vector(data, on_host::target_of(data, size, at, elements), value);
  }
};

// __shared__ is `static` here, so every block meets the same object: its first use in a block
// poisons it.
template <typename T, int count>
class Shared {
 public:
  on_host::Reference<T> operator[](on_host::Subscript at) { return span()[at]; }
  template <typename Vector>
  Vector load(on_host::Subscript at) {
    return span().template load<Vector>(at);
  }
  template <typename Vector>
  void store(on_host::Subscript at, Vector value) {
    span().store(at, value);
  }
  SharedSpan<T> span() {
    if (serial_ != on_host::block_serial()) {
      serial_ = on_host::block_serial();
      std::memset(bytes_, 0xFF, sizeof bytes_);
    }
    return {reinterpret_cast<T*>(bytes_), count, elements_};
  }

 private:
  alignas(16) unsigned char bytes_[count * sizeof(T)];
  on_host::Element elements_[count * sizeof(T) / on_host::kBytesOfElement];
  uint64_t serial_ = 0;
};

template <typename T>
SharedSpan<T> dynamic_shared(int count, int byte_offset = 0, const char* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
  const on_host::Dynamic dynamic =
      on_host::dynamic_shared(byte_offset, count * sizeof(T), alignof(T), {file, line});
  return {static_cast<T*>(dynamic.memory), count, dynamic.elements};
}

}  // namespace rdarts
