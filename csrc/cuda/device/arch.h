// What kernels may ask of the hardware, and nothing else: under nvcc PTX and intrinsics, under g++ the emulator of
// tests/cuda_on_cpu. Both sides define the same names; kernels contain no assembly and no CUDA header.
//
//   types         BFloat16, Float16 (bits); Vector16 (16 bytes as four words)
//   convert       to_float(x), from_float<T>(x), pack<T>(low, high) -> two T in a word, unpack<T>(word, 0 or 1)
//                 multiply_pair<T>(a, b): the two products of two words, rounded
//   math          exp2_approx(x), reciprocal_approx(x)
//   memory        load16(p), store16(p, v): aligned vectors; shared_address(p) -> uint32_t; shared_bytes() -> dynamic
//   memory
//                 shared_store4(address, word), shared_load16(address): by 32-bit address, which saves registers
//   copies        cp_async16(shared, global, valid), cp_async_commit(), cp_async_wait<groups that may still run>()
//   matrices      ldmatrix_x4(words, shared), ldmatrix_x4_trans(words, shared)
//                 mma<T>(d, a, b0, b1): m16n8k16, T = BFloat16 or Float16, float accumulators
//                 mma_tf32(d, a, b0, b1): m16n8k8, operands float bits rounded by to_tf32(x)
//   counters      next_ticket(counter): 0, 1, ... each once, in shared or global memory; of 64 bits in global memory
//                 that other blocks read and write too: atomic_max(p, value) -> what was there; load_relaxed(p),
//                 store_relaxed(p, value): whole, but they order nothing else
//   other blocks  raise_flag(flag, value): after all that this thread has done and, by barriers, knows of;
//                 wait_for_flag(flag, value): until at least that is there, from a block that is running
//   warps         shuffle_xor(x, mask), shuffle(x, lane), any_lane(condition): whole warps; sync_warp(); sync_block()
//   registers     opaque(x): x, but what follows from it is not computed ahead of here, where it would occupy registers
#pragma once

#ifdef __CUDACC__
#include "cuda/device/ptx.h"
#else
#include "emulator/arch.h"
#endif
