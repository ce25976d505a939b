// A stack of its own for every fiber, and the switch from one to another. For cuda_on_cpu.cpp
// alone.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

constexpr std::size_t kStack = 256 * 1024;

#ifdef __x86_64__
using Context = void*;
// Leaves the registers that a function preserves on the stack, and goes on with another stack.
extern "C" void cuda_on_cpu_switch(Context* from, Context to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

inline void switch_context(Context& from, Context& to) { cuda_on_cpu_switch(&from, to); }

inline void start_context(Context& context, char* stack, void (*entry)()) {
  // As a call leaves it: the stack pointer is 16n + 8 at the first instruction.
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  *top = reinterpret_cast<void*>(entry);
  context = top - 6;
}
#else
using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void start_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

}  // namespace cuda_on_cpu
