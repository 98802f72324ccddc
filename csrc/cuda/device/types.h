// The storage types of the kernels, as bits, and what one vector access moves.
#pragma once

#include <cstdint>

namespace qemb::cuda {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};
struct alignas(16) Vector16 {
    uint32_t word[4];
};

}  // namespace qemb::cuda
