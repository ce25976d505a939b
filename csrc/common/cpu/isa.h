// One kernel source, several instruction sets.
//
// csrc/*/cpu/*_kernel.cpp is compiled once per instruction set with -DALRAO_ISA=<name>, and puts
// everything into `namespace alrao::cpu::ALRAO_ISA`. Inside `namespace alrao::cpu`,
//
//   ALRAO_DECLARE_KERNEL(void, scale, (float* x, int64_t n, float factor));   // in a header
//   ALRAO_KERNEL(scale)(x, n, 2.0f);                                          // in other sources
//
// declare it for every compiled instruction set and call the one chosen for this machine.
#pragma once

namespace alrao::cpu {

enum class Isa { plain, v2, v3, v4 };

// The instruction set in use: the best this machine supports, or the one ALRAO_CPU_ISA names (read
// once). Throws std::runtime_error where that one is unknown, not built or not supported here. Not
// inline: a copy compiled for v4 must never serve a machine without it.
Isa selected_isa();

const char* isa_name(Isa isa);

// Set by setup.py where the compiler builds x86-64-v2, v3 and v4.
#ifdef ALRAO_MULTI_ISA

#define ALRAO_DECLARE_KERNEL(ret, name, args) \
  namespace v2 {                              \
  ret name args;                              \
  }                                           \
  namespace v3 {                              \
  ret name args;                              \
  }                                           \
  namespace v4 {                              \
  ret name args;                              \
  }                                           \
  static_assert(true, "a semicolon follows")

template <class Function>
Function* choose_kernel(Function* for_v2, Function* for_v3, Function* for_v4) {
  static const Isa isa = selected_isa();
  return isa == Isa::v4 ? for_v4 : isa == Isa::v3 ? for_v3 : for_v2;
}

#define ALRAO_KERNEL(name)                                                       \
  (::alrao::cpu::choose_kernel(&::alrao::cpu::v2::name, &::alrao::cpu::v3::name, \
                               &::alrao::cpu::v4::name))

#else

#define ALRAO_DECLARE_KERNEL(ret, name, args) \
  namespace plain {                           \
  ret name args;                              \
  }                                           \
  static_assert(true, "a semicolon follows")

#define ALRAO_KERNEL(name) (&::alrao::cpu::plain::name)

#endif

}  // namespace alrao::cpu
