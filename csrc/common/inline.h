// Functions that several compilations share. They are always inlined: cpu/kernels are compiled once per instruction
// set, and a copy out of line, made with wide instructions, could be the one that the linker keeps for every processor.
#pragma once

#define QEMB_INLINE inline __attribute__((always_inline))

// Called by the host and by CUDA kernels alike. QEMB_MATH(exp2)(x): that function of math.h, on the CPU as a builtin.
#if defined(__CUDACC__)
#define QEMB_HOST_DEVICE __host__ __device__ __forceinline__
#define QEMB_MATH(function) ::function
#else
#define QEMB_HOST_DEVICE QEMB_INLINE
#define QEMB_MATH(function) __builtin_##function
#endif
