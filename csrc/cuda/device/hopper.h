// What Hopper (sm_90a) adds to arch.h; kernels of cuda/sm90 alone use it. Shared memory is named by 32-bit addresses.
//
//   barriers in memory   mbarrier_init(barrier, arrivals), then fence_mbarrier_init(); mbarrier_arrive(barrier);
//                        mbarrier_expect(barrier, bytes): arrives, and a phase ends only after so many bytes of copies;
//                        mbarrier_wait(barrier, parity): until the phase of that parity has ended (0 is the first)
//   of some threads      barrier_sync(id, threads), barrier_arrive(id, threads): id from 1 to 15; the latter does not
//   wait copy engine          TensorMap, a QEMB_GRID_CONSTANT parameter of the kernel (cuda/tensor_map.h makes it); one
//   thread calls
//                        tma_load(shared, map, barrier, {x, ...}); tma_store(map, shared, {x, ...}), tma_add(map,
//                        shared, {x,
//                        ...}). Runs of bytes: bulk_load(shared, global, bytes, barrier), bulk_store(global, shared,
//                        bytes), bulk_add(global floats, shared, bytes). bulk_commit() closes a group of stores;
//                        bulk_wait_read<n>(): all but n groups have read, bulk_wait<n>(): and written
//   other blocks         publish(flag, value): after all that this thread
//   has done
//                        and waited for; wait_for(flag, value): until at least that is published, by a block that is
//                        running
//   proxies              fence_async(): what this thread has written to shared memory may be read by copies and wgmma
//   products             wgmma_fence() before the first of a row of products; wgmma<T, N, major of a, major of b>(d, a,
//   b,
//                        add) with operands described by matrix(...), or wgmma<T, N, major of b>(d, words of a, b,
//                        add): 64 x N, depth 16, by 128 threads; wgmma_commit(), wgmma_wait<groups that may still
//                        run>()
//   registers            registers_increase<n>(), registers_decrease<n>() by whole warpgroups
#pragma once

#include "cuda/device/arch.h"

#ifdef __CUDACC__
#include "cuda/device/ptx_sm90.h"
#else
#include "emulator/hopper.h"
#endif

namespace qemb::cuda {

// An operand of wgmma whose tile lies in shared memory in rows of 128 bytes, swizzled, its corner at a multiple of
// 1024.
//   K along the rows:       8 rows an atom; `leading` is ignored. 32 bytes further on the next 16 of K begin.
//   M or N along the rows:  64 of them; `leading` bytes from one 64 to the next. 2048 bytes further on the next 16 of K
//   begin.
QEMB_DEVICE uint64_t matrix(uint32_t shared, uint32_t leading = 16) {
    return static_cast<uint64_t>((shared & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
           static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}

}  // namespace qemb::cuda
