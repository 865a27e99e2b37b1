// A fiber: a stack of its own and a switch that, unlike glibc's, makes no system call.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace on_host {

class Fiber {
 public:
  // The thread of the operating system that switches to the others.
  Fiber() = default;
  // Starts `entry` at the first switch to it; it must never return.
  void start(void* stack, size_t bytes, void (*entry)());
  // Leaves `from`, which goes on when something switches to it.
  static void switch_from(Fiber& from, Fiber& to);

 private:
#ifdef __x86_64__
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace on_host
