// The machine's controls and the planted faults for Python's ctypes, which compiles in a tenth of
// the time of a module. What can fail returns the error's text, or null.
#include <exception>
#include <string>

#include "block.h"
#include "faults/faults.h"
#include "on_host/runtime.h"

#define ON_HOST_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string answer;  // what the last call returned

template <typename Call>
const char* error_of(Call call) {
  try {
    call();
    return nullptr;
  } catch (const std::exception& error) {
    answer = error.what();
    return answer.c_str();
  }
}

}  // namespace

ON_HOST_EXPORT const char* on_host_set_thread_order(const char* order, uint64_t seed) {
  return error_of([&] { on_host::set_thread_order(order, seed); });
}

// One line for each kernel: its launches, bytes read, bytes written and name.
ON_HOST_EXPORT const char* on_host_counts() {
  answer.clear();
  for (const auto& [kernel, counts] : on_host::counts()) {
    answer += std::to_string(counts.launches) + " " + std::to_string(counts.bytes_read) + " " +
              std::to_string(counts.bytes_written) + " " + kernel + "\n";
  }
  return answer.c_str();
}

ON_HOST_EXPORT void on_host_reset() { on_host::reset(); }

ON_HOST_EXPORT int on_host_add_device(int capability) { return on_host::add_device(capability); }

ON_HOST_EXPORT void on_host_set_driver(int version) { on_host::set_driver(version); }

ON_HOST_EXPORT bool on_host_runs_on(const char* arch, int capability) {
  return rdarts::runs_on(arch, capability);
}

ON_HOST_EXPORT const char* on_host_run_fault(const char* name, bool planted, float* out,
                                             int64_t out_size, const float* in, int64_t in_size) {
  return error_of([&] { faults::table().at(name)(planted, {out, out_size}, {in, in_size}); });
}
