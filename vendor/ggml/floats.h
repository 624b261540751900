// Products with weights of F16 and BF16, as a file has them: few-rows.cpp says what of.
//
// A vector of eight sums belongs to a row and a column; its lanes are added at the end. So a row's
// result does not depend, bit for bit, on the rows beside it.
#pragma once

#include "ggml-cpu-impl.h"
#include "lanes.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int FLOAT_LANES = 8;
constexpr int FLOAT_COLS = 4; // columns, and
constexpr int FLOAT_ROWS = 3; // rows, whose sums are in registers at the same time
constexpr int FLOAT_SET = 24; // rows whose activations stay in the L2 cache

inline __m256 load_floats(const ggml_fp16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}

inline __m256 load_floats(const ggml_bf16_t* p) {
    const __m256i upper = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(upper, 16));
}

// The sum of all lanes, added in the order of ggml_vec_dot_q8_0_q8_0.
inline float sum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_extractf128_ps(v, 1), _mm256_castps256_ps128(v));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// out[r][c] = sum over k of x[r] * w[c], for R rows and C columns.
template <int R, int C, typename W>
FEW_ROWS_KERNEL void dot_floats(const W* w, const float* const* x, int64_t k, float* out,
                                size_t out_stride) {
    constexpr int AHEAD = 1024; // bytes of weights to prefetch
    __m256 acc[R][C];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            acc[r][c] = _mm256_setzero_ps();
        }
    }
    for (int64_t i = 0; i < k; i += FLOAT_LANES) {
        __m256 row[R];
        for (int r = 0; r < R; r++) {
            row[r] = _mm256_loadu_ps(x[r] + i);
        }
        for (int c = 0; c < C; c++) {
            const W* values = w + c * k + i;
            _mm_prefetch((const char*)values + AHEAD, _MM_HINT_T0);
            const __m256 column = load_floats(values);
            for (int r = 0; r < R; r++) {
                acc[r][c] = _mm256_fmadd_ps(column, row[r], acc[r][c]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            out[r * out_stride + c] = sum(acc[r][c]);
        }
    }
}

// The same for up to FLOAT_ROWS rows and FLOAT_COLS columns.
template <typename W>
void dot_floats(int rows, int cols, const W* w, const float* const* x, int64_t k, float* out,
                size_t out_stride) {
    unroll<FLOAT_ROWS>([&](auto r) {
        unroll<FLOAT_COLS>([&](auto c) {
            if (rows == r + 1 && cols == c + 1) {
                dot_floats<r + 1, c + 1>(w, x, k, out, out_stride);
            }
        });
    });
}

template <typename W>
void mul_mat_floats(const ggml_compute_params* params, ggml_tensor* op, int64_t chunk_bytes) {
    const ggml_tensor *weights = op->src[0], *src = op->src[1];
    const int64_t k = weights->ne[0], cols = weights->ne[1], rows = ggml_nrows(src);
    const auto activations = [&](int64_t r) {
        const int64_t r1 = r % src->ne[1], r2 = r / src->ne[1] % src->ne[2],
                      r3 = r / (src->ne[1] * src->ne[2]);
        return (const float*)((const char*)src->data + r1 * src->nb[1] + r2 * src->nb[2] +
                              r3 * src->nb[3]);
    };

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    const int64_t units = (cols + FLOAT_COLS - 1) / FLOAT_COLS;
    const int64_t per_turn = params->nth * chunk_bytes;
    const int64_t chunks =
        std::min(units, (int64_t)(ggml_nbytes(weights) + per_turn - 1) / per_turn * params->nth);
    for (int64_t chunk = params->ith; chunk < chunks;
         chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        for (int64_t set = 0; set < rows; set += FLOAT_SET) {
            const int64_t end = std::min(rows, set + FLOAT_SET);
            for (int64_t u = units * chunk / chunks; u < units * (chunk + 1) / chunks; u++) {
                const int64_t col = u * FLOAT_COLS;
                const int n_cols = std::min<int64_t>(FLOAT_COLS, cols - col);
                for (int64_t row = set; row < end; row += FLOAT_ROWS) {
                    const int n_rows = std::min<int64_t>(FLOAT_ROWS, end - row);
                    const float* x[FLOAT_ROWS];
                    for (int r = 0; r < n_rows; r++) {
                        x[r] = activations(row + r);
                    }
                    const size_t stride = op->nb[1] / sizeof(float);
                    dot_floats(n_rows, n_cols, (const W*)weights->data + col * k, x, k,
                               (float*)op->data + row * stride + col, stride);
                }
            }
        }
    }
}

} // namespace
