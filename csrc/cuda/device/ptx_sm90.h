// hopper.h for nvcc. sm_90a.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "cuda/device/ptx.h"

#define QEMB_GRID_CONSTANT __grid_constant__

namespace qemb::cuda {

using TensorMap = CUtensorMap;

QEMB_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
QEMB_DEVICE void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
QEMB_DEVICE void mbarrier_expect(uint32_t barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
QEMB_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done, over;\n"
        ".reg .u32 spins;\n"
        "mov.u32 spins, 0;\n"
        "AGAIN:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n" QEMB_COUNT_SPIN
        "@!done bra AGAIN;\n"
        "}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}
QEMB_DEVICE void barrier_sync(uint32_t id, int threads) {
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
QEMB_DEVICE void barrier_arrive(uint32_t id, int threads) {
    asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

QEMB_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
QEMB_DEVICE void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_async();
}

// By their number of coordinates, from the contiguous dimension on.
template <int kRank>
QEMB_DEVICE void tma_load(uint32_t shared, const TensorMap& map, uint32_t barrier, const int (&at)[kRank]) {
    if constexpr (kRank == 1)
        asm volatile(
            "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3}], "
            "[%2];" ::"r"(shared),
            "l"(&map), "r"(barrier), "r"(at[0])
            : "memory");
    else if constexpr (kRank == 2)
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
            "[%2];" ::"r"(shared),
            "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1])
            : "memory");
    else if constexpr (kRank == 3)
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, "
            "%5}], "
            "[%2];" ::"r"(shared),
            "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2])
            : "memory");
    else
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
            "%6}], "
            "[%2];" ::"r"(shared),
            "l"(&map), "r"(barrier), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3])
            : "memory");
}
#define QEMB_TMA_OUT(instruction, end) \
    if constexpr (kRank == 1) \
        asm volatile(instruction ".1d.global.shared::cta" end " [%0, {%2}], [%1];" ::"l"(&map), "r"(shared), \
                     "r"(at[0]) \
                     : "memory"); \
    else if constexpr (kRank == 2) \
        asm volatile(instruction ".2d.global.shared::cta" end " [%0, {%2, %3}], [%1];" ::"l"(&map), "r"(shared), \
                     "r"(at[0]), "r"(at[1]) \
                     : "memory"); \
    else if constexpr (kRank == 3) \
        asm volatile(instruction ".3d.global.shared::cta" end " [%0, {%2, %3, %4}], [%1];" ::"l"(&map), "r"(shared), \
                     "r"(at[0]), "r"(at[1]), "r"(at[2]) \
                     : "memory"); \
    else \
        asm volatile(instruction ".4d.global.shared::cta" end " [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map), \
                     "r"(shared), "r"(at[0]), "r"(at[1]), "r"(at[2]), "r"(at[3]) \
                     : "memory")
template <int kRank>
QEMB_DEVICE void tma_store(const TensorMap& map, uint32_t shared, const int (&at)[kRank]) {
    QEMB_TMA_OUT("cp.async.bulk.tensor", ".tile.bulk_group");
}
template <int kRank>
QEMB_DEVICE void tma_add(const TensorMap& map, uint32_t shared, const int (&at)[kRank]) {
    QEMB_TMA_OUT("cp.reduce.async.bulk.tensor", ".add.tile.bulk_group");
}
#undef QEMB_TMA_OUT
QEMB_DEVICE void bulk_load(uint32_t shared, const void* global, int bytes, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}
QEMB_DEVICE void bulk_store(void* global, uint32_t shared, int bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
                 : "memory");
}
QEMB_DEVICE void bulk_add(float* global, uint32_t shared, int bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
                 "r"(shared), "r"(bytes)
                 : "memory");
}
QEMB_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
QEMB_DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
template <int kPending>
QEMB_DEVICE void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// What the copy engine has written comes before the flag, and what it will touch after.
QEMB_DEVICE void publish(int* flag, int value) {
    asm volatile("fence.proxy.async.global;" ::: "memory");
    raise_flag(flag, value);
}
QEMB_DEVICE void wait_for(const int* flag, int value) {
    wait_for_flag(flag, value);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

enum class Major { kK, kMN };
QEMB_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
QEMB_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
QEMB_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The accumulators as operands of the assembler: %0 to %31, to %63, to %127.
#define QEMB_D32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QEMB_D64 \
    QEMB_D32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QEMB_D128 \
    QEMB_D64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define QEMB_R8(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define QEMB_R32(i) QEMB_R8(i), QEMB_R8(i + 8), QEMB_R8(i + 16), QEMB_R8(i + 24)
#define QEMB_R64(i) QEMB_R32(i), QEMB_R32(i + 32)
#define QEMB_R128(i) QEMB_R64(i), QEMB_R64(i + 64)

// Operands after the accumulators, by number: the matrices (or words) of a and b, whether to add, which of them lie
// across.
#define QEMB_WGMMA_SHARED(n, type, count, a, b, add, across_a, across_b) \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
                 "k16.f32." type "." type " {" QEMB_D##count "}, " a ", " b ", add, 1, 1, " across_a ", " across_b \
                                                             ";\n}" \
                 : QEMB_R##count(0) \
                 : "l"(a_matrix), "l"(b_matrix), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)), \
                   "n"(static_cast<int>(kB)))
#define QEMB_WGMMA_WORDS(n, type, count, a0, a1, a2, a3, b, add, across_b) \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n \
                 "k16.f32." type "." type " {" QEMB_D##count "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b \
                                                             ", add, 1, 1, " across_b ";\n}" \
                 : QEMB_R##count(0) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "r"(static_cast<int>(accumulate)), \
                   "n"(static_cast<int>(kB)))

template <class T, int kN, Major kA = Major::kK, Major kB = Major::kK>
QEMB_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a_matrix, uint64_t b_matrix, bool accumulate) {
    static_assert(kN == 64 || kN == 128 || kN == 256);
    constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;
    if constexpr (kN == 64 && kIsBFloat16)
        QEMB_WGMMA_SHARED("64", "bf16", 32, "%32", "%33", "%34", "%35", "%36");
    else if constexpr (kN == 64)
        QEMB_WGMMA_SHARED("64", "f16", 32, "%32", "%33", "%34", "%35", "%36");
    else if constexpr (kN == 128 && kIsBFloat16)
        QEMB_WGMMA_SHARED("128", "bf16", 64, "%64", "%65", "%66", "%67", "%68");
    else if constexpr (kN == 128)
        QEMB_WGMMA_SHARED("128", "f16", 64, "%64", "%65", "%66", "%67", "%68");
    else if constexpr (kIsBFloat16)
        QEMB_WGMMA_SHARED("256", "bf16", 128, "%128", "%129", "%130", "%131", "%132");
    else
        QEMB_WGMMA_SHARED("256", "f16", 128, "%128", "%129", "%130", "%131", "%132");
}
template <class T, int kN, Major kB = Major::kK>
QEMB_DEVICE void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b_matrix, bool accumulate) {
    static_assert(kN == 64 || kN == 128 || kN == 256);
    constexpr bool kIsBFloat16 = std::is_same_v<T, BFloat16>;
    if constexpr (kN == 64 && kIsBFloat16)
        QEMB_WGMMA_WORDS("64", "bf16", 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    else if constexpr (kN == 64)
        QEMB_WGMMA_WORDS("64", "f16", 32, "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    else if constexpr (kN == 128 && kIsBFloat16)
        QEMB_WGMMA_WORDS("128", "bf16", 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
    else if constexpr (kN == 128)
        QEMB_WGMMA_WORDS("128", "f16", 64, "%64", "%65", "%66", "%67", "%68", "%69", "%70");
    else if constexpr (kIsBFloat16)
        QEMB_WGMMA_WORDS("256", "bf16", 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134");
    else
        QEMB_WGMMA_WORDS("256", "f16", 128, "%128", "%129", "%130", "%131", "%132", "%133", "%134");
}

template <int kRegisters>
QEMB_DEVICE void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
QEMB_DEVICE void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace qemb::cuda
