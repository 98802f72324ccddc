// What the copy engine must know of a tensor in global memory: made on the host for each call, passed to the kernel by
// value.
#pragma once

#include "cuda/device/hopper.h"
#include "cuda/launch.h"

namespace qemb::cuda {

// Up to four dimensions, the contiguous one first. A box of it is copied at a time; what lies beyond the tensor is zero
// in shared memory and is not written in global memory.
struct TensorShape {
    const void* base;
    int rank;
    int64_t size[4];         // elements
    int64_t byte_stride[4];  // of dimensions 1 and up
    int box[4];              // elements
    bool swizzled;           // rows of 128 bytes, their chunks permuted: what wgmma reads without bank conflicts

    // The engine's own limits, so that a tensor that it would refuse goes another way.
    bool fits(int element_bytes) const {
        bool fits = reinterpret_cast<uintptr_t>(base) % 16 == 0;
        for (int d = 0; d < rank; ++d) {
            fits = fits && size[d] > 0 && size[d] < int64_t{1} << 32 && box[d] > 0 && box[d] <= 256;
            if (d > 0)
                fits = fits && byte_stride[d] >= 0 && byte_stride[d] % 16 == 0 && byte_stride[d] < int64_t{1} << 40;
        }
        const int row = box[0] * element_bytes;
        return fits && row % 16 == 0 && (!swizzled || row == 128);
    }
};

#ifdef __CUDACC__
// The driver's encoder, found at run time: the library is not linked against the driver. Null where it has none.
inline auto tensor_map_encoder() {
    using Encoder = decltype(&cuTensorMapEncodeTiled);
    static const Encoder encoder = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encoder>(found)
                                                                             : nullptr;
    }();
    return encoder;
}

// False where the engine cannot copy such a tensor.
template <class T>
bool make_tensor_map(TensorMap& map, const TensorShape& shape) {
    const auto encode = tensor_map_encoder();
    if (!encode || !shape.fits(sizeof(T))) return false;
    cuuint64_t size[4], stride[4];
    cuuint32_t box[4], step[4] = {1, 1, 1, 1};
    for (int d = 0; d < shape.rank; ++d) {
        size[d] = static_cast<cuuint64_t>(shape.size[d]);
        box[d] = static_cast<cuuint32_t>(shape.box[d]);
        if (d > 0) stride[d - 1] = static_cast<cuuint64_t>(shape.byte_stride[d]);
    }
    const auto type = sizeof(T) == 4                ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                      : std::is_same_v<T, BFloat16> ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    return encode(&map, type, static_cast<cuuint32_t>(shape.rank), const_cast<void*>(shape.base), size, stride, box,
                  step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                  shape.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#else
template <class T>
bool make_tensor_map(TensorMap& map, const TensorShape& shape) {
    if (!shape.fits(sizeof(T))) return false;
    map = {const_cast<char*>(static_cast<const char*>(shape.base)),
           {1, 1, 1, 1},
           {},
           {1, 1, 1, 1},
           shape.rank,
           sizeof(T),
           shape.swizzled,
           sizeof(T) == 4};
    for (int d = 0; d < shape.rank; ++d) {
        map.size[d] = shape.size[d];
        map.box[d] = shape.box[d];
        map.stride[d] = d == 0 ? int64_t{sizeof(T)} : shape.byte_stride[d];
    }
    return true;
}
#endif

}  // namespace qemb::cuda
