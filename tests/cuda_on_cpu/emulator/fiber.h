// One CUDA thread = one fiber: a stack of its own, switched by hand. x86-64.
#pragma once

#include <cstddef>
#include <cstdint>

#include "emulator/pages.h"

#if !defined(__x86_64__)
#error "the emulator switches stacks in x86-64 assembly"
#endif

namespace emulator {

extern "C" void emulator_switch(void** save, void* to);
asm(R"(
.text
.weak emulator_switch
.type emulator_switch, @function
emulator_switch:
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
.size emulator_switch, .-emulator_switch
)");

class Fiber {
  public:
    static constexpr size_t kStack = 128 * 1024;

    // The first switch_to() starts `entry`, which must never return. Stacks of one warp start at different places in a
    // page: otherwise all of them would fight for the same few lines of the cache.
    void start(void (*entry)(), int lane) {
        auto* top = reinterpret_cast<uint64_t*>(stack_.end() - 64 - lane * 128);
        *--top = 0;
        *--top = reinterpret_cast<uint64_t>(entry);
        for (int i = 0; i < 6; ++i) *--top = 0;
        here_ = top;
    }
    void switch_to(Fiber& next) { emulator_switch(&here_, next.here_); }
    void leave(void*& to) { emulator_switch(&here_, to); }
    void enter(void*& from) { emulator_switch(&from, here_); }
    bool holds(const void* p) const { return p >= stack_.begin() && p < stack_.end(); }

  private:
    Pages stack_{kStack, "the stack of a thread"};
    void* here_ = nullptr;
};

}  // namespace emulator
