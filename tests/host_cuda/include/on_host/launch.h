// What takes the place of kernel<<<...>>>.
#pragma once

#include "machine.h"

namespace on_host {

// Whether a GPU would take the launch; where not, cudaGetLastError says why.
bool launchable(const void* kernel, dim3 blocks, dim3 threads, size_t shared);

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, dim3 threads,
            size_t shared, const Parameters&... arguments) {
  if (!launchable(reinterpret_cast<const void*>(kernel), blocks, threads, shared)) return;
  run(name, blocks, threads, shared, [&] { kernel(arguments...); });
}

}  // namespace on_host
