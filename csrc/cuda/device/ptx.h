// arch.h for nvcc. sm_80 and newer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device/types.h"

#define QEMB_DEVICE __device__ __forceinline__

namespace qemb::cuda {

QEMB_DEVICE float to_float(float x) { return x; }
QEMB_DEVICE float to_float(BFloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
QEMB_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
QEMB_DEVICE T from_float(float x);
template <>
QEMB_DEVICE float from_float<float>(float x) {
    return x;
}
template <>
QEMB_DEVICE BFloat16 from_float<BFloat16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
QEMB_DEVICE Float16 from_float<Float16>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}

template <class T>
QEMB_DEVICE uint32_t pack(float low, float high);
template <>
QEMB_DEVICE uint32_t pack<BFloat16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <>
QEMB_DEVICE uint32_t pack<Float16>(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
template <class T>
QEMB_DEVICE float unpack(uint32_t word, int half) {
    return to_float(T{static_cast<uint16_t>(half ? word >> 16 : word)});
}

template <class T>
QEMB_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b);
template <>
QEMB_DEVICE uint32_t multiply_pair<BFloat16>(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(word) : "r"(a), "r"(b), "r"(0x80008000u));
    return word;
}
template <>
QEMB_DEVICE uint32_t multiply_pair<Float16>(uint32_t a, uint32_t b) {
    uint32_t word;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    return word;
}

QEMB_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
QEMB_DEVICE float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
QEMB_DEVICE uint32_t to_tf32(float x) {
    uint32_t word;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
    return word;
}

QEMB_DEVICE Vector16 load16(const void* from) {
    const uint4 v = *static_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
}
QEMB_DEVICE void store16(void* to, const Vector16& v) {
    *static_cast<uint4*>(to) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

extern __shared__ __align__(1024) char qemb_shared[];
QEMB_DEVICE char* shared_bytes() { return qemb_shared; }
QEMB_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

QEMB_DEVICE void shared_store4(uint32_t address, uint32_t word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}
QEMB_DEVICE Vector16 shared_load16(uint32_t address) {
    Vector16 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "r"(address)
                 : "memory");
    return v;
}

// 16 bytes; zeros where not valid (the address must still be one that may be formed).
QEMB_DEVICE void cp_async16(uint32_t shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
QEMB_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
QEMB_DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

QEMB_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}
QEMB_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

template <class T>
QEMB_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
QEMB_DEVICE void mma<BFloat16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
QEMB_DEVICE void mma<Float16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
QEMB_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

QEMB_DEVICE int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

QEMB_DEVICE int next_ticket(int* counter) { return atomicAdd(counter, 1); }
QEMB_DEVICE uint64_t atomic_max(uint64_t* p, uint64_t value) {
    return atomicMax(reinterpret_cast<unsigned long long*>(p), static_cast<unsigned long long>(value));
}
QEMB_DEVICE uint64_t load_relaxed(const uint64_t* p) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
    return value;
}
QEMB_DEVICE void store_relaxed(uint64_t* p, uint64_t value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(value) : "memory");
}

// With QEMB_BOUNDED_SPINS a wait that never ends is a trap, and so an error of the launch, instead of a GPU that hangs:
// for the first runs of new kernels, which it makes slower (they spill). A loop outside of the assembly would also
// serialize wgmma.
#ifdef QEMB_BOUNDED_SPINS
#define QEMB_COUNT_SPIN "add.u32 spins, spins, 1;\nsetp.gt.u32 over, spins, 67108864;\n@over trap;\n"
#else
#define QEMB_COUNT_SPIN ""
#endif
QEMB_DEVICE void raise_flag(int* flag, int value) {
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
QEMB_DEVICE void wait_for_flag(const int* flag, int value) {
    asm volatile(
        "{\n"
        ".reg .pred done, over;\n"
        ".reg .u32 spins;\n"
        ".reg .s32 seen;\n"
        "mov.u32 spins, 0;\n"
        "AGAIN:\n"
        "ld.acquire.gpu.global.s32 seen, [%0];\n"
        "setp.ge.s32 done, seen, %1;\n" QEMB_COUNT_SPIN
        "@!done bra AGAIN;\n"
        "}" ::"l"(flag),
        "r"(value)
        : "memory");
}

template <class T>
QEMB_DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(~0u, x, mask);
}
template <class T>
QEMB_DEVICE T shuffle(T x, int lane) {
    return __shfl_sync(~0u, x, lane);
}
QEMB_DEVICE bool any_lane(bool x) { return __any_sync(~0u, x); }
QEMB_DEVICE void sync_warp() { __syncwarp(); }
QEMB_DEVICE void sync_block() { __syncthreads(); }

}  // namespace qemb::cuda
