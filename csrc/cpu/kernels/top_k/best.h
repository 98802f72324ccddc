// The best of many scores: one number for a score and its document, kept in a reservoir that a selection thins out.
#pragma once

#include "cpu/simd/vec.h"

namespace qemb::cpu::QEMB_ISA {

// A document and its score in one number that is larger the better it ranks: higher score, then lower index. Zero is
// none.
using Found = uint64_t;

QEMB_INLINE Found found_of(float score, int64_t index) {
    uint32_t bits;
    const float positive_zero = score + 0.0f;
    __builtin_memcpy(&bits, &positive_zero, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Found>(bits) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(index));
}
QEMB_INLINE float score_of(Found found) {
    uint32_t bits = static_cast<uint32_t>(found >> 32);
    bits = bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits;
    float score;
    __builtin_memcpy(&score, &bits, sizeof score);
    return score;
}
QEMB_INLINE int64_t index_of(Found found) { return static_cast<uint32_t>(~static_cast<uint32_t>(found)); }

QEMB_INLINE void swap(Found& a, Found& b) {
    const Found held = a;
    a = b;
    b = held;
}

// Moves the k largest of `size` distinct numbers to the front, the k-th of them to its end.
inline void select(Found* data, int64_t size, int64_t k) {
    int64_t low = 0, high = size - 1;
    const int64_t wanted = k - 1;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;  // the median of three becomes the pivot
        if (data[middle] > data[low]) swap(data[middle], data[low]);
        if (data[high] > data[low]) swap(data[high], data[low]);
        if (data[high] > data[middle]) swap(data[high], data[middle]);
        const Found pivot = data[middle];
        int64_t i = low, j = high;
        while (i <= j) {
            while (data[i] > pivot) ++i;
            while (data[j] < pivot) --j;
            if (i <= j) swap(data[i++], data[j--]);
        }
        if (wanted <= j)
            high = j;
        else if (wanted >= i)
            low = i;
        else
            return;
    }
}

// Best first.
inline void sort(Found* data, int64_t size) {
    while (size > 16) {
        const int64_t half = size / 2;
        select(data, size, half);
        sort(data + half, size - half);
        size = half;
    }
    for (int64_t i = 1; i < size; ++i) {
        const Found moved = data[i];
        int64_t at = i;
        for (; at > 0 && data[at - 1] < moved; --at) data[at] = data[at - 1];
        data[at] = moved;
    }
}

// The best k of what is added, among up to `capacity` that are kept until a selection thins them out.
template <class T>
struct Best {
    Found* data;
    int64_t size, k, capacity;
    T least;  // a score below has no chance

    QEMB_INLINE void add(float score, int64_t index) {
        data[size++] = found_of(score, index);
        if (size == capacity) thin();
    }
    void thin() {
        if (size < k) return;
        select(data, size, k);
        size = k;
        const float score = score_of(data[k - 1]);
        // In float64 a little less can still become that score as a float.
        least = sizeof(T) == sizeof(float)
                    ? static_cast<T>(score)
                    : static_cast<T>(score - 1e-7 * static_cast<double>(score < 0 ? -score : score) - 1e-300);
    }
};

}  // namespace qemb::cpu::QEMB_ISA
