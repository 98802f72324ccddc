// A screen in front of exact scores: products of 16-bit integers, twice as fast as float ones with AVX2. What it lets
// pass is scored exactly; what it holds back is provably below the bar.
//
// q ~ q' / a and d ~ d' / b with q', d' of integers. |q.d - q'.d' / ab| <= |q - q'/a| |d| + |q'/a| |d - d'/b| by Cauchy
// and Schwarz, and the norms are known. They are also why no sum of products overflows: |q'| |d'| < 2^31.
#pragma once

#include "cpu/simd/gemm.h"

namespace qemb::cpu::QEMB_ISA {

inline constexpr bool kScreens = QEMB_VECTOR_BYTES == 32;  // with AVX-512 the float products are as fast
inline constexpr int64_t kScreenRows = 64;      // queries from which on it pays to make integers of documents
inline constexpr float kScreenNorm = 32000.0f;  // of the longest vector; an int16 holds each of its elements

inline size_t screen_bytes(int64_t rows, int64_t documents, int64_t pairs) {
    const int64_t integers = rows * pairs + left_size<int32_t>(rows, pairs) + documents * pairs +
                             panel_size<int32_t>(pairs, documents) + 3 * rows + 64;
    return static_cast<size_t>(integers) * sizeof(int32_t);
}

struct Screen {
    int64_t rows, dim, pairs;
    int32_t *query_words, *query_tiles, *document_words, *panels;
    float *query_norms, *query_errors;  // |q|, |q - q'/a|
    float query_scale = 0, document_scale = 0, document_norm = 0, document_error = 0;

    Screen(void* memory, int64_t rows_, int64_t documents, int64_t dim_)
        : rows(rows_), dim(dim_), pairs((dim_ + 1) / 2) {
        query_words = static_cast<int32_t*>(memory);
        query_tiles = query_words + rows * pairs;
        document_words = query_tiles + left_size<int32_t>(rows, pairs);
        panels = document_words + documents * pairs;
        query_norms = reinterpret_cast<float*>(panels + panel_size<int32_t>(pairs, documents));
        query_errors = query_norms + rows;
    }

    // False where a vector is not finite, or so long or short that its scale is not.
    bool set_queries(const float* queries) {
        float longest = 0;
        for (int64_t row = 0; row < rows; ++row)
            longest = worst_of(longest, dot(queries + row * dim, queries + row * dim, dim));
        if (!scale_for(longest, query_scale)) return false;
        for (int64_t row = 0; row < rows; ++row) {
            query_norms[row] = __builtin_sqrtf(dot(queries + row * dim, queries + row * dim, dim));
            query_errors[row] = to_integers(queries + row * dim, query_scale, query_words + row * pairs);
        }
        pack_left(by_rows(query_words, pairs), rows, pairs, query_tiles);
        return true;
    }
    bool set_documents(const float* documents, int64_t count) {
        float longest = 0;
        for (int64_t row = 0; row < count; ++row)
            longest = worst_of(longest, dot(documents + row * dim, documents + row * dim, dim));
        if (!scale_for(longest, document_scale)) return false;
        document_norm = __builtin_sqrtf(longest);
        document_error = 0;
        for (int64_t row = 0; row < count; ++row)
            document_error = max_of(document_error,
                                    to_integers(documents + row * dim, document_scale, document_words + row * pairs));
        pack_transposed(document_words, pairs, count, pairs, panels);
        return true;
    }
    void score(int64_t first, int64_t height, int64_t count, int32_t* scores, int64_t stride) const {
        gemm(height, count, pairs, by_tiles(query_tiles + first * pairs, pairs), panels, scores, stride, false);
    }
    // The least product of integers that a score of `least` can have. Sums in float err too: hence the last term.
    int32_t bar(int64_t row, float least) const {
        const double norms = static_cast<double>(query_norms[row]) * document_norm;
        const double error = static_cast<double>(query_errors[row]) * document_norm +
                             (static_cast<double>(query_norms[row]) + query_errors[row]) * document_error +
                             2e-7 * static_cast<double>(dim + 8) * norms;
        const double bar = (static_cast<double>(least) - error) * query_scale * document_scale - 1;
        return bar < -2147483000.0 ? -2147483647 : bar > 2147483000.0 ? 2147483647 : static_cast<int32_t>(bar);
    }

  private:
    static float worst_of(float longest, float norm) { return norm >= longest || norm != norm ? norm : longest; }
    static bool scale_for(float squared, float& scale) {
        if (!(squared < 1e30f) || (squared > 0 && squared < 1e-20f)) return false;
        scale = squared > 0 ? kScreenNorm / __builtin_sqrtf(squared) : 1.0f;
        return true;
    }
    // Writes round(x * scale); returns an upper bound of |x - integers / scale|.
    float to_integers(const float* x, float scale, int32_t* words) const {
        constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
        auto* out = reinterpret_cast<int16_t*>(words);
        typedef int16_t Halves __attribute__((vector_size(QEMB_VECTOR_BYTES / 2), aligned(2), may_alias));
        Vec<float> squares{};
        int64_t i = 0;
        for (; i + kLanes<float> <= dim; i += kLanes<float>) {
            const Vec<float> scaled = load(x + i) * scale, rounded = (scaled + kMagic) - kMagic;
            squares += (scaled - rounded) * (scaled - rounded);
            *reinterpret_cast<Halves*>(out + i) =
                __builtin_convertvector(__builtin_convertvector(rounded, Vec<int32_t>), Halves);
        }
        float sum = sum_lanes<float>(squares);
        for (; i < dim; ++i) {
            const float scaled = x[i] * scale, rounded = (scaled + kMagic) - kMagic;
            sum += (scaled - rounded) * (scaled - rounded);
            out[i] = static_cast<int16_t>(rounded);
        }
        if (dim % 2) out[dim] = 0;
        return __builtin_sqrtf(sum) / scale * 1.0001f;
    }
};

}  // namespace qemb::cpu::QEMB_ISA
