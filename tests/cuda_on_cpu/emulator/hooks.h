// What a compiler calls under -fsanitize=thread, answered by our race detector instead of the library of that name.
#pragma once

#include "emulator/block.h"

namespace emulator {

// Tracked is what lies in shared memory or in a DeviceMemory.
__attribute__((no_sanitize("thread"))) inline void plain_access(const void* p, size_t bytes, bool write) {
    if (!Races::in_kernel || !Races::on) return;
    Races::in_kernel = false;  // what follows may be instrumented itself
    if (!running->fiber.holds(p) && (Block::current()->in_arena(p) || Pages::used(p))) races().access(p, bytes, write);
    Races::in_kernel = true;
}

}  // namespace emulator

#define EMULATOR_HOOK extern "C" __attribute__((weak, no_sanitize("thread")))
#define EMULATOR_ACCESS(name, bytes) \
    EMULATOR_HOOK void __tsan_read##name(void* p) { ::emulator::plain_access(p, bytes, false); } \
    EMULATOR_HOOK void __tsan_write##name(void* p) { ::emulator::plain_access(p, bytes, true); } \
    EMULATOR_HOOK void __tsan_unaligned_read##name(void* p) { ::emulator::plain_access(p, bytes, false); } \
    EMULATOR_HOOK void __tsan_unaligned_write##name(void* p) { ::emulator::plain_access(p, bytes, true); }
EMULATOR_ACCESS(1, 1)
EMULATOR_ACCESS(2, 2)
EMULATOR_ACCESS(4, 4)
EMULATOR_ACCESS(8, 8)
EMULATOR_ACCESS(16, 16)
#undef EMULATOR_ACCESS
EMULATOR_HOOK void __tsan_read_range(void* p, size_t bytes) { ::emulator::plain_access(p, bytes, false); }
EMULATOR_HOOK void __tsan_write_range(void* p, size_t bytes) { ::emulator::plain_access(p, bytes, true); }
EMULATOR_HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
    if (bytes) ::emulator::plain_access(from, bytes, false), ::emulator::plain_access(to, bytes, true);
    return __builtin_memcpy(to, from, bytes);
}
EMULATOR_HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
    if (bytes) ::emulator::plain_access(from, bytes, false), ::emulator::plain_access(to, bytes, true);
    return __builtin_memmove(to, from, bytes);
}
EMULATOR_HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
    if (bytes) ::emulator::plain_access(to, bytes, true);
    return __builtin_memset(to, value, bytes);
}
EMULATOR_HOOK void __tsan_init() { ::emulator::Races::on = true; }
EMULATOR_HOOK void __tsan_func_entry(void*) {}
EMULATOR_HOOK void __tsan_func_exit() {}
EMULATOR_HOOK void __tsan_vptr_update(void**, void*) {}
EMULATOR_HOOK void __tsan_vptr_read(void**) {}
EMULATOR_HOOK uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }
EMULATOR_HOOK uint32_t __tsan_atomic32_fetch_add(volatile uint32_t* p, uint32_t by, int) {
    const uint32_t old = *p;
    *p = old + by;
    return old;
}
#undef EMULATOR_HOOK
