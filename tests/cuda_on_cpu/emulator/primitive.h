// How a primitive of arch.h or hopper.h begins.
#pragma once

#include "emulator/block.h"

// A last argument that kernels leave out: the line that calls.
#define EMULATOR_LINE const char *file = __builtin_FILE(), int line = __builtin_LINE()
// The emulator's own accesses are not the kernel's; then the block, and where the kernel is.
#define EMULATOR_ENTER(name) \
    const ::emulator::Inside inside; \
    ::emulator::Block& block = *::emulator::Block::current(); \
    const ::emulator::Place place{name, file, line}; \
    (void)block, (void)place
