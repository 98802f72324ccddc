// One CUDA thread = one fiber: a stack of its own, switched by hand. x86-64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

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

    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;
    ~Fiber() { std::free(stack_); }

    // The next resume() starts `entry`, which must never return.
    void start(void (*entry)()) {
        if (!stack_) stack_ = static_cast<char*>(std::aligned_alloc(64, kStack));
        auto* top = reinterpret_cast<uint64_t*>(stack_ + kStack - 64);
        *--top = 0;
        *--top = reinterpret_cast<uint64_t>(entry);
        for (int i = 0; i < 6; ++i) *--top = 0;
        here_ = top;
    }
    void resume() { emulator_switch(&back_, here_); }
    void yield() { emulator_switch(&here_, back_); }

  private:
    char* stack_ = nullptr;
    void* here_ = nullptr;
    void* back_ = nullptr;
};

}  // namespace emulator
