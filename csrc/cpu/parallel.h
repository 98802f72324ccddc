// The only place with threads. Work runs on torch's own OpenMP runtime where torch has loaded one (a second pool on the
// same cores would fight its spinning threads), and on a small blocking pool otherwise: C++ tests, sanitizers, a forked
// child.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qemb::cpu {

int num_threads();
void set_num_threads(int count);  // of the own pool; torch's runtime follows torch.set_num_threads

// Calls run(context, item) for each item in [0, count), longest first if the caller ordered them so. Items must not
// depend on which thread runs them. The first exception is rethrown when all threads are done.
void run_parallel(int64_t count, void (*run)(void* context, int64_t item), void* context);

template <class Function>
void parallel_for(int64_t count, Function&& function) {
    run_parallel(
        count, [](void* context, int64_t item) { (*static_cast<Function*>(context))(item); },
        const_cast<void*>(static_cast<const void*>(&function)));
}

// 64-byte aligned memory of this thread, kept between calls; valid until the thread asks again for the same slot.
enum class Slot : int { kTile, kPanel, kPartial, kIndex, kCount };
void* scratch_bytes(Slot slot, size_t bytes);

}  // namespace qemb::cpu
