// Barriers and fences, and what the lanes of a warp do together.
#pragma once

#include <cstring>
#include <string>

#include "machine.h"

#define ON_HOST_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(ON_HOST_SITE) {
  on_host::wait_for_block("__syncthreads", {file, line}, false);
}
inline int __syncthreads_count(int predicate, ON_HOST_SITE) {
  return on_host::wait_for_block("__syncthreads_count", {file, line}, predicate != 0);
}
inline int __syncthreads_or(int predicate, ON_HOST_SITE) {
  return on_host::wait_for_block("__syncthreads_or", {file, line}, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate, ON_HOST_SITE) {
  return on_host::wait_for_block("__syncthreads_and", {file, line}, predicate == 0) == 0;
}

inline void __threadfence() { on_host::fence(); }

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, ON_HOST_SITE) {
  on_host::sync_lanes("__syncwarp", {file, line}, mask);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, ON_HOST_SITE) {
  return on_host::vote("__ballot_sync", {file, line}, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate, ON_HOST_SITE) {
  return on_host::vote("__any_sync", {file, line}, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, ON_HOST_SITE) {
  return on_host::vote("__all_sync", {file, line}, mask, predicate == 0) == 0;
}

namespace on_host {

template <typename T>
T shuffle(const char* primitive, Site site, unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles take types of 4 and 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(primitive, site, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The first lane of the caller's group of `width` lanes.
inline int group_start(int width, Site site) {
  if (width < 1 || width > kWarp || (width & (width - 1)) != 0) {
    fail(site, "a shuffle's width must be a power of two up to 32, found " + std::to_string(width));
  }
  return lane() & ~(width - 1);
}

}  // namespace on_host

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, ON_HOST_SITE) {
  const int start = on_host::group_start(width, {file, line});
  return on_host::shuffle("__shfl_sync", {file, line}, mask, value, start + (source & (width - 1)));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, ON_HOST_SITE) {
  const int start = on_host::group_start(width, {file, line}), me = on_host::lane();
  const int source = me - static_cast<int>(delta);
  return on_host::shuffle("__shfl_up_sync", {file, line}, mask, value,
                          source < start ? me : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, ON_HOST_SITE) {
  const int start = on_host::group_start(width, {file, line}), me = on_host::lane();
  const int source = me + static_cast<int>(delta);
  return on_host::shuffle("__shfl_down_sync", {file, line}, mask, value,
                          source >= start + width ? me : source);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, ON_HOST_SITE) {
  const int start = on_host::group_start(width, {file, line}), me = on_host::lane();
  const int source = me ^ bits;
  return on_host::shuffle("__shfl_xor_sync", {file, line}, mask, value,
                          source >= start + width ? me : source);
}

#undef ON_HOST_SITE
