// Products with weights of F16 and BF16, as a file has them: few-rows.cpp says what of.
//
// A vector of eight sums belongs to a row and a column; its lanes are added at the end. So a row's
// result does not depend, bit for bit, on the rows beside it. No weights are fetched ahead: the
// processor foresees reading a few columns in order.
#pragma once

#include "ggml-cpu-impl.h"
#include "lanes.h"

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int FLOAT_LANES = 8;
constexpr int FLOAT_COLS = 4;    // columns, and
constexpr int FLOAT_ROWS = 3;    // rows, whose sums are in registers at the same time
constexpr int FLOAT_SET = 96;    // rows whose sums stay in the L1 cache
constexpr int FLOAT_PART = 1024; // values of a column that stay in it while many rows use them

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

// Adds the products of n values of R rows and C columns to their sums: of a row FLOAT_COLS vectors.
template <int R, int C, typename W>
FEW_ROWS_KERNEL void add_products(const W* w, int64_t k, const float* const* x, int64_t n,
                                  float* sums) {
    __m256 acc[R][C];
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            acc[r][c] = _mm256_loadu_ps(sums + (r * FLOAT_COLS + c) * FLOAT_LANES);
        }
    }
    for (int64_t i = 0; i < n; i += FLOAT_LANES) {
        __m256 row[R];
        for (int r = 0; r < R; r++) {
            row[r] = _mm256_loadu_ps(x[r] + i);
            FEW_ROWS_NOW(row[r]);
        }
        for (int c = 0; c < C; c++) {
            const __m256 column = load_floats(w + c * k + i);
            for (int r = 0; r < R; r++) {
                acc[r][c] = _mm256_fmadd_ps(column, row[r], acc[r][c]);
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int c = 0; c < C; c++) {
            _mm256_storeu_ps(sums + (r * FLOAT_COLS + c) * FLOAT_LANES, acc[r][c]);
        }
    }
}

// The same for up to FLOAT_ROWS rows and FLOAT_COLS columns.
template <typename W>
void add_products(int rows, int cols, const W* w, int64_t k, const float* const* x, int64_t n,
                  float* sums) {
    unroll<FLOAT_ROWS>([&](auto r) {
        unroll<FLOAT_COLS>([&](auto c) {
            if (rows == r + 1 && cols == c + 1) {
                add_products<r + 1, c + 1>(w, k, x, n, sums);
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
            const int64_t n_rows = std::min<int64_t>(FLOAT_SET, rows - set);
            const int64_t part = n_rows <= FLOAT_ROWS ? k : FLOAT_PART;
            for (int64_t u = units * chunk / chunks; u < units * (chunk + 1) / chunks; u++) {
                const int64_t col = u * FLOAT_COLS;
                const int n_cols = std::min<int64_t>(FLOAT_COLS, cols - col);
                const W* w = (const W*)weights->data + col * k;
                float sums[FLOAT_SET * FLOAT_COLS * FLOAT_LANES];
                std::fill(sums, sums + n_rows * FLOAT_COLS * FLOAT_LANES, 0.0f);
                for (int64_t i = 0; i < k; i += part) {
                    const int64_t n = std::min(part, k - i);
                    for (int64_t row = 0; row < n_rows; row += FLOAT_ROWS) {
                        const int together = std::min<int64_t>(FLOAT_ROWS, n_rows - row);
                        const float* x[FLOAT_ROWS];
                        for (int r = 0; r < together; r++) {
                            x[r] = activations(set + row + r) + i;
                        }
                        add_products(together, n_cols, w + i, k, x, n,
                                     sums + row * FLOAT_COLS * FLOAT_LANES);
                    }
                }
                for (int64_t row = 0; row < n_rows; row++) {
                    float* out = (float*)((char*)op->data + (set + row) * op->nb[1]) + col;
                    for (int c = 0; c < n_cols; c++) {
                        out[c] = sum(_mm256_loadu_ps(sums + (row * FLOAT_COLS + c) * FLOAT_LANES));
                    }
                }
            }
        }
    }
}

} // namespace
