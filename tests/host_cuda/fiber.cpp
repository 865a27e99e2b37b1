#include "fiber.h"

#include <cstdint>

#ifdef __x86_64__

// Saves what a function must keep, changes the stack, restores: (void** save, void* load).
asm(R"(
.text
.hidden on_host_switch
.globl on_host_switch
.type on_host_switch, @function
on_host_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size on_host_switch, .-on_host_switch
)");
extern "C" void on_host_switch(void** save, void* load);

namespace on_host {

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  const auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15};
  auto* const words = reinterpret_cast<uintptr_t*>(top);
  words[-1] = 0;  // where entry would return to
  words[-2] = reinterpret_cast<uintptr_t>(entry);
  for (int saved = 3; saved <= 8; ++saved) words[-saved] = 0;
  stack_pointer_ = words - 8;
}

void Fiber::switch_from(Fiber& from, Fiber& to) {
  on_host_switch(&from.stack_pointer_, to.stack_pointer_);
}

}  // namespace on_host

#else

namespace on_host {

void Fiber::start(void* stack, size_t bytes, void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = bytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::switch_from(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

}  // namespace on_host

#endif
