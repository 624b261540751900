// Matrix multiplications with a few rows of activations, as in verifying a drafted continuation
// or decoding a few streams: out[row][column] = sum over k of activations[row][k] *
// weights[column][k].
//
//   weights      cols x k, Q4_0, Q4_1 or Q8_0 in blocks of 32 values, or Q4_K, Q5_K or Q6_K in
//                blocks of 256. Either repacked, so that eight columns' blocks are interleaved
//                (Q4_0 by ggml, the others by ggml_few_rows_repack below), or Q4_1 and Q8_0 as a
//                file stores them.
//   activations  rows x k, F32; quantized to Q8_0 in the work buffer, once for each operation.
//   out          rows x cols, F32.
//
// Such a multiplication is bound by reading the weights from memory: 0.56 (Q4_0, Q4_K), 0.63
// (Q4_1), 0.69 (Q5_K), 0.82 (Q6_K) or 1.06 (Q8_0) bytes for each product of a row. So each block of
// weights is read and unpacked once for up to eight rows, whose sums stay in registers. No kernel
// stores unpacked weights.
//
// A row's result does not depend, bit for bit, on the rows beside it nor on the number of threads:
// a block's products are summed exactly, in integers, and blocks in F32 in the order of k.

#include "few-rows.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "repack.h"
#include "simd-mappings.h"
#include "quants.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace {

constexpr int MAX_ROWS = 512;          // more rows are left to ggml where it has a kernel
constexpr int GROUP = 8;               // rows whose sums are in registers at the same time
constexpr int SET = 32;                // rows whose activations stay in the L1 cache
constexpr int64_t CHUNK_BYTES = 32768; // of weights: what a thread takes at a time
constexpr int AHEAD = 2048;            // bytes of weights to prefetch

// Eight columns of Q4_1. qs: four values of each column in turn; the upper half of a byte is 16
// values after its lower half.
struct block_q4_1x8 {
    ggml_half d[8];
    ggml_half m[8];
    uint8_t qs[QK4_1 * 4];
};

// The scales of two groups of 32 values (0..63 each, of eight columns), as two nibbles of a byte
// (scale, minimum) and above them two bits each.
struct pair_of_scales {
    uint8_t low[2][8];
    uint8_t high[8]; // two bits each: scale and minimum of the first group, of the second
};

constexpr int GROUPS = QK_K / 32;

// Eight columns of Q4_K. qs as in block_q4_1x8, for each group of 32 values.
struct columns_q4_K {
    ggml_half d[8];
    ggml_half dmin[8];
    pair_of_scales scales[GROUPS / 2];
    uint8_t qs[GROUPS][128];
};

// Eight columns of Q5_K. Bit i of a byte of qh belongs to the i-th four values of its column.
struct columns_q5_K {
    ggml_half d[8];
    ggml_half dmin[8];
    pair_of_scales scales[GROUPS / 2];
    uint8_t qs[GROUPS][128];
    uint8_t qh[GROUPS][32];
};

// Eight columns of Q6_K. A byte of qh has two bits for each four values: of 0..15, then 16..31.
struct columns_q6_K {
    ggml_half d[8];
    int8_t scales[GROUPS][2][8]; // of values 0..15 and of 16..31
    uint8_t qs[GROUPS][128];
    uint8_t qh[GROUPS][2][32];
};

static_assert(sizeof(block_q4_1x8) == 8 * sizeof(block_q4_1), "padding");
static_assert(sizeof(columns_q4_K) == 8 * sizeof(block_q4_K), "padding");
static_assert(sizeof(columns_q5_K) == 8 * sizeof(block_q5_K), "padding");
static_assert(sizeof(columns_q6_K) == 8 * sizeof(block_q6_K), "padding");
static_assert(sizeof(block_q8_0x8) == 8 * sizeof(block_q8_0), "padding");
static_assert(sizeof(block_q4_0x8) == 8 * sizeof(block_q4_0), "padding");
static_assert(QK4_0 == QK8_0 && QK4_1 == QK8_0, "weights and activations in equal blocks");

// Activations, quantized in blocks of 32 values. All rows of a block are adjacent in memory, since
// the kernels read them together.
struct Activations {
    int8_t* qs;      // [block][row][32]
    float* d;        // [block][row], the scale
    int32_t* offset; // [block][row], 8 * the sum of qs
    float* s;        // [block][row], d * the sum of qs
    int32_t* half;   // [block][row], the sum of the first 16 of qs
    int64_t rows;

    static size_t size(int64_t k, int64_t rows) {
        return k * rows + k / QK8_0 * rows * (2 * sizeof(float) + 2 * sizeof(int32_t));
    }

    Activations(void* data, int64_t k, int64_t rows) : rows(rows) {
        qs = (int8_t*)data;
        d = (float*)(qs + k * rows);
        offset = (int32_t*)(d + k / QK8_0 * rows);
        s = (float*)(offset + k / QK8_0 * rows);
        half = (int32_t*)(s + k / QK8_0 * rows);
    }

    // Blocks block_start..block_end of all rows of src.
    void quantize(const ggml_tensor* src, int64_t block_start, int64_t block_end) {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t r1 = r % src->ne[1], r2 = r / src->ne[1] % src->ne[2],
                          r3 = r / (src->ne[1] * src->ne[2]);
            const float* x = (const float*)((const char*)src->data + r1 * src->nb[1] +
                                            r2 * src->nb[2] + r3 * src->nb[3]);
            for (int64_t b = block_start; b < block_end; b++) {
                block_q8_0 q;
                quantize_row_q8_0(x + b * QK8_0, &q, QK8_0);
                const int64_t i = b * rows + r;
                int32_t sum = 0;
                for (int j = 0; j < QK8_0; j++) {
                    if (j == QK8_0 / 2) {
                        half[i] = sum;
                    }
                    sum += q.qs[j];
                }
                memcpy(qs + i * QK8_0, q.qs, QK8_0);
                d[i] = GGML_CPU_FP16_TO_FP32(q.d);
                offset[i] = 8 * sum;
                s[i] = d[i] * sum;
            }
        }
    }
};

inline __m256i load_256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

// Eight bytes, four times.
inline __m256i repeat_64(const void* p) {
    return _mm256_castpd_si256(_mm256_broadcast_sd((const double*)p));
}

// The sum of all lanes, added in the order of ggml_vec_dot_q8_0_q8_0.
inline float sum(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_extractf128_ps(v, 1), _mm256_castps256_ps128(v));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// Eight columns: R rows from row0 on.
template <int R>
void dot(const block_q4_0x8* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    const __m256i sign_bits = _mm256_set1_epi8((char)0x88);
    const __m256i ones = _mm256_set1_epi16(1);

    __m256 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm256_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char*)w + AHEAD + 64, _MM_HINT_T0);

        // Weights of -8..7 are taken as 0..15: maddubs needs an unsigned operand, and 16 products
        // fit into 16 bits. A vector holds eight values of four columns: 0..3 in the even vectors,
        // 4..7 in the odd ones.
        __m256i lo[4], hi[4];
        for (int i = 0; i < 4; i++) {
            const __m256i v = _mm256_xor_si256(load_256(w->qs + 32 * i), sign_bits);
            lo[i] = _mm256_and_si256(v, low_nibbles);
            hi[i] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low_nibbles);
        }
        // In the columns' order in the sums below: 0 1 4 5 2 3 6 7.
        const __m256 dw = _mm256_cvtph_ps(
            _mm_shuffle_epi32(_mm_loadu_si128((const __m128i*)w->d), _MM_SHUFFLE(3, 1, 2, 0)));

        for (int r = 0; r < R; r++) {
            const int64_t i = b * a.rows + row0 + r;
            const int8_t* q = a.qs + i * QK8_0;
            const __m256i q0 = repeat_64(q);
            const __m256i q1 = repeat_64(q + 8);
            const __m256i q2 = repeat_64(q + 16);
            const __m256i q3 = repeat_64(q + 24);
            const __m256i c0123 = _mm256_add_epi16(
                _mm256_add_epi16(_mm256_maddubs_epi16(lo[0], q0), _mm256_maddubs_epi16(lo[2], q1)),
                _mm256_add_epi16(_mm256_maddubs_epi16(hi[0], q2), _mm256_maddubs_epi16(hi[2], q3)));
            const __m256i c4567 = _mm256_add_epi16(
                _mm256_add_epi16(_mm256_maddubs_epi16(lo[1], q0), _mm256_maddubs_epi16(lo[3], q1)),
                _mm256_add_epi16(_mm256_maddubs_epi16(hi[1], q2), _mm256_maddubs_epi16(hi[3], q3)));
            const __m256i dots =
                _mm256_sub_epi32(_mm256_madd_epi16(_mm256_hadd_epi16(c0123, c4567), ones),
                                 _mm256_set1_epi32(a.offset[i]));
            acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots),
                                     _mm256_mul_ps(dw, _mm256_set1_ps(a.d[i])), acc[r]);
        }
    }

    for (int r = 0; r < R; r++) {
        const __m256d in_order =
            _mm256_permute4x64_pd(_mm256_castps_pd(acc[r]), _MM_SHUFFLE(3, 1, 2, 0));
        _mm256_storeu_ps(out + (row0 + r) * out_stride, _mm256_castpd_ps(in_order));
    }
}

// Four bytes, eight times.
inline __m256i repeat_32(const void* p) {
    return _mm256_castps_si256(_mm256_broadcast_ss((const float*)p));
}

// Eight columns: R rows from row0 on.
template <int R>
void dot(const block_q4_1x8* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    const __m256i ones = _mm256_set1_epi16(1);

    __m256 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm256_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char*)w + AHEAD + 64, _MM_HINT_T0);
        _mm_prefetch((const char*)w + AHEAD + 128, _MM_HINT_T0);

        // A vector holds four values of each of the eight columns.
        __m256i v[8];
        for (int i = 0; i < 4; i++) {
            const __m256i qs = load_256(w->qs + 32 * i);
            v[i] = _mm256_and_si256(qs, low_nibbles);
            v[i + 4] = _mm256_and_si256(_mm256_srli_epi16(qs, 4), low_nibbles);
        }
        const __m256 dw = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w->d));
        const __m256 mw = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w->m));

        for (int r = 0; r < R; r++) {
            const int64_t i = b * a.rows + row0 + r;
            const int8_t* q = a.qs + i * QK8_0;
            // At most 16*15*127: the sum of 16 products fits into 16 bits.
            __m256i dots = _mm256_maddubs_epi16(v[0], repeat_32(q));
            for (int j = 1; j < 8; j++) {
                dots = _mm256_add_epi16(dots, _mm256_maddubs_epi16(v[j], repeat_32(q + 4 * j)));
            }
            acc[r] = _mm256_fmadd_ps(mw, _mm256_broadcast_ss(a.s + i), acc[r]);
            acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(dots, ones)),
                                     _mm256_mul_ps(dw, _mm256_broadcast_ss(a.d + i)), acc[r]);
        }
    }

    for (int r = 0; r < R; r++) {
        _mm256_storeu_ps(out + (row0 + r) * out_stride, acc[r]);
    }
}

// Eight columns: R rows from row0 on.
template <int R>
void dot(const block_q8_0x8* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    const __m256i ones = _mm256_set1_epi16(1);

    __m256 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm256_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        for (int i = 0; i < 5; i++) {
            _mm_prefetch((const char*)w + AHEAD + 64 * i, _MM_HINT_T0);
        }

        const int8_t* q = a.qs + (b * a.rows + row0) * QK8_0;
        __m256i dots[R];
        for (int j = 0; j < 8; j++) {
            // maddubs needs an unsigned operand: the activations take the weights' signs.
            const __m256i v = load_256(w->qs + 32 * j);
            const __m256i abs = _mm256_abs_epi8(v);
            for (int r = 0; r < R; r++) {
                const __m256i products = _mm256_madd_epi16(
                    _mm256_maddubs_epi16(abs,
                                         _mm256_sign_epi8(repeat_32(q + r * QK8_0 + 4 * j), v)),
                    ones);
                dots[r] = j == 0 ? products : _mm256_add_epi32(dots[r], products);
            }
        }
        const __m256 dw = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w->d));
        for (int r = 0; r < R; r++) {
            const __m256 d = _mm256_mul_ps(dw, _mm256_broadcast_ss(a.d + b * a.rows + row0 + r));
            acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[r]), d, acc[r]);
        }
    }

    for (int r = 0; r < R; r++) {
        _mm256_storeu_ps(out + (row0 + r) * out_stride, acc[r]);
    }
}

inline __m256i widen_8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
}

// d * scale and -dmin * minimum of the group with number `i` of a pair.
inline void scales_of(const pair_of_scales& pair, int i, __m256 d, __m256 dmin, __m256& dw,
                      __m256& mw) {
    const __m256i low = widen_8(pair.low[i]);
    const __m256i high = _mm256_srli_epi32(widen_8(pair.high), 4 * i);
    const __m256i two_bits = _mm256_set1_epi32(0x30);
    const __m256i scale = _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi32(15)),
                                          _mm256_and_si256(_mm256_slli_epi32(high, 4), two_bits));
    const __m256i minimum = _mm256_or_si256(_mm256_srli_epi32(low, 4),
                                            _mm256_and_si256(_mm256_slli_epi32(high, 2), two_bits));
    dw = _mm256_mul_ps(d, _mm256_cvtepi32_ps(scale));
    mw = _mm256_mul_ps(dmin, _mm256_cvtepi32_ps(minimum));
}

// d and -dmin of eight columns.
struct HalfFloats {
    __m256 d, dmin;

    template <typename BLOCK>
    explicit HalfFloats(const BLOCK& w)
        : d(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w.d))),
          dmin(_mm256_sub_ps(_mm256_setzero_ps(),
                             _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w.dmin)))) {}
};

// A group's values without their upper bits: four of each of the eight columns in a vector.
inline void nibbles(const uint8_t* qs, __m256i v[8]) {
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    for (int i = 0; i < 4; i++) {
        const __m256i q = load_256(qs + 32 * i);
        v[i] = _mm256_and_si256(q, low_nibbles);
        v[i + 4] = _mm256_and_si256(_mm256_srli_epi16(q, 4), low_nibbles);
    }
}

// The values of a group of Q4_K.
inline void values(const columns_q4_K& w, int group, __m256i v[8]) { nibbles(w.qs[group], v); }

// The values of a group of Q5_K.
inline void values(const columns_q5_K& w, int group, __m256i v[8]) {
    const __m256i bit = _mm256_set1_epi8(16);
    nibbles(w.qs[group], v);
    const __m256i h = load_256(w.qh[group]);
    for (int i = 0; i < 8; i++) {
        const __m256i at = i < 4 ? _mm256_slli_epi16(h, 4 - i) : _mm256_srli_epi16(h, i - 4);
        v[i] = _mm256_or_si256(v[i], _mm256_and_si256(at, bit));
    }
}

// The values of a group of Q6_K: -32..31 as 0..63, the unsigned operand. 32 times the sum of the
// activations is to be subtracted.
inline void values(const columns_q6_K& w, int group, __m256i v[8]) {
    const __m256i two_bits = _mm256_set1_epi8(0x30);
    nibbles(w.qs[group], v);
    for (int part = 0; part < 2; part++) {
        const __m256i h = load_256(w.qh[group][part]);
        const __m256i at[4] = {_mm256_slli_epi16(h, 4), _mm256_slli_epi16(h, 2), h,
                               _mm256_srli_epi16(h, 2)};
        for (int i = 0; i < 4; i++) {
            v[4 * part + i] = _mm256_or_si256(v[4 * part + i], _mm256_and_si256(at[i], two_bits));
        }
    }
}

// Products of a group with a row: of at most 31 * 127, so that those of eight values fit into 16
// bits, and with Q4_K those of sixteen.
template <typename BLOCK>
inline __m256i products(const __m256i v[8], const int8_t* q) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i dots = _mm256_maddubs_epi16(v[0], repeat_32(q));
    for (int j = 1; j < 4; j++) {
        dots = _mm256_add_epi16(dots, _mm256_maddubs_epi16(v[j], repeat_32(q + 4 * j)));
    }
    if constexpr (std::is_same_v<BLOCK, columns_q4_K>) {
        for (int j = 4; j < 8; j++) {
            dots = _mm256_add_epi16(dots, _mm256_maddubs_epi16(v[j], repeat_32(q + 4 * j)));
        }
        return _mm256_madd_epi16(dots, ones);
    }
    __m256i more = _mm256_maddubs_epi16(v[4], repeat_32(q + 16));
    for (int j = 5; j < 8; j++) {
        more = _mm256_add_epi16(more, _mm256_maddubs_epi16(v[j], repeat_32(q + 4 * j)));
    }
    return _mm256_add_epi32(_mm256_madd_epi16(dots, ones), _mm256_madd_epi16(more, ones));
}

template <typename BLOCK>
inline void prefetch(const BLOCK* w, int group) {
    constexpr int LINES = (sizeof(BLOCK) / GROUPS + 63) / 64;
    for (int i = 0; i < LINES; i++) {
        _mm_prefetch((const char*)w + AHEAD + (group * LINES + i) * 64, _MM_HINT_T0);
    }
}

// Eight columns of Q4_K or Q5_K: R rows from row0 on.
template <int R, typename BLOCK>
void dot_with_minimum(const BLOCK* w, int64_t blocks, const Activations& a, int64_t row0,
                      float* out, size_t out_stride) {
    __m256 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm256_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        const HalfFloats scales(*w);
        for (int group = 0; group < GROUPS; group++) {
            prefetch(w, group);
            __m256i v[8];
            values(*w, group, v);
            __m256 dw, mw;
            scales_of(w->scales[group / 2], group % 2, scales.d, scales.dmin, dw, mw);

            for (int r = 0; r < R; r++) {
                const int64_t i = (b * GROUPS + group) * a.rows + row0 + r;
                const __m256i dots = products<BLOCK>(v, a.qs + i * QK8_0);
                acc[r] = _mm256_fmadd_ps(mw, _mm256_broadcast_ss(a.s + i), acc[r]);
                acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots),
                                         _mm256_mul_ps(dw, _mm256_broadcast_ss(a.d + i)), acc[r]);
            }
        }
    }

    for (int r = 0; r < R; r++) {
        _mm256_storeu_ps(out + (row0 + r) * out_stride, acc[r]);
    }
}

template <int R>
void dot(const columns_q4_K* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    dot_with_minimum<R>(w, blocks, a, row0, out, out_stride);
}

template <int R>
void dot(const columns_q5_K* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    dot_with_minimum<R>(w, blocks, a, row0, out, out_stride);
}

// d * the scale of 16 values of each column.
inline __m256 scale_of_half(const int8_t* scales, __m256 d) {
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)scales));
    return _mm256_mul_ps(d, _mm256_cvtepi32_ps(wide));
}

// Eight columns: R rows from row0 on.
template <int R>
void dot(const columns_q6_K* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    const __m256i ones = _mm256_set1_epi16(1);

    __m256 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm256_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        const __m256 d = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w->d));
        for (int group = 0; group < GROUPS; group++) {
            prefetch(w, group);
            __m256i v[8];
            values(*w, group, v);
            const __m256 dw[2] = {scale_of_half(w->scales[group][0], d),
                                  scale_of_half(w->scales[group][1], d)};

            for (int r = 0; r < R; r++) {
                const int64_t i = (b * GROUPS + group) * a.rows + row0 + r;
                const int8_t* q = a.qs + i * QK8_0;
                const int32_t sums[2] = {a.half[i], a.offset[i] / 8 - a.half[i]};
                __m256 dots[2];
                for (int part = 0; part < 2; part++) {
                    // At most 4 * 63 * 127: the sum of four products fits into 16 bits.
                    const __m256i* u = v + 4 * part;
                    const int8_t* p = q + 16 * part;
                    const __m256i one =
                        _mm256_add_epi16(_mm256_maddubs_epi16(u[0], repeat_32(p)),
                                         _mm256_maddubs_epi16(u[1], repeat_32(p + 4)));
                    const __m256i two =
                        _mm256_add_epi16(_mm256_maddubs_epi16(u[2], repeat_32(p + 8)),
                                         _mm256_maddubs_epi16(u[3], repeat_32(p + 12)));
                    const __m256i all = _mm256_add_epi32(_mm256_madd_epi16(one, ones),
                                                         _mm256_madd_epi16(two, ones));
                    dots[part] = _mm256_cvtepi32_ps(
                        _mm256_sub_epi32(all, _mm256_set1_epi32(32 * sums[part])));
                }
                const __m256 both = _mm256_fmadd_ps(dw[1], dots[1], _mm256_mul_ps(dw[0], dots[0]));
                acc[r] = _mm256_fmadd_ps(both, _mm256_broadcast_ss(a.d + i), acc[r]);
            }
        }
    }

    for (int r = 0; r < R; r++) {
        _mm256_storeu_ps(out + (row0 + r) * out_stride, acc[r]);
    }
}

// With VNNI, one instruction multiplies and adds four values of sixteen columns: of the block
// at w and of the block of the next eight columns, `blocks` after it. The sums are the same
// integers, and added in the same order, as in the kernels above.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define FEW_ROWS_PAIRS

inline __m512i load_pair(const void* a, const void* b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_256(a)), load_256(b), 1);
}

inline __m512 load_pair_f16(const ggml_half* a, const ggml_half* b) {
    const __m128i lo = _mm_loadu_si128((const __m128i*)a);
    const __m128i hi = _mm_loadu_si128((const __m128i*)b);
    return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1));
}

// Four bytes, sixteen times.
inline __m512i repeat_32_wide(const void* p) {
    int32_t v;
    memcpy(&v, p, sizeof(v));
    return _mm512_set1_epi32(v);
}

inline void prefetch_block(const void* p, size_t size) {
    for (size_t i = 0; i < size; i += 64) {
        _mm_prefetch((const char*)p + AHEAD + i, _MM_HINT_T0);
    }
}

// Sixteen columns: R rows from row0 on.
template <int R>
void dot_pair(const block_q4_1x8* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
              size_t out_stride) {
    const __m512i low_nibbles = _mm512_set1_epi8(15);

    __m512 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm512_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        const block_q4_1x8* w2 = w + blocks;
        prefetch_block(w, sizeof(*w));
        prefetch_block(w2, sizeof(*w2));

        __m512i v[8];
        for (int i = 0; i < 4; i++) {
            const __m512i qs = load_pair(w->qs + 32 * i, w2->qs + 32 * i);
            v[i] = _mm512_and_si512(qs, low_nibbles);
            v[i + 4] = _mm512_and_si512(_mm512_srli_epi16(qs, 4), low_nibbles);
        }
        const __m512 dw = load_pair_f16(w->d, w2->d);
        const __m512 mw = load_pair_f16(w->m, w2->m);

        for (int r = 0; r < R; r++) {
            const int64_t i = b * a.rows + row0 + r;
            const int8_t* q = a.qs + i * QK8_0;
            __m512i dots = _mm512_setzero_si512();
            for (int j = 0; j < 8; j++) {
                dots = _mm512_dpbusd_epi32(dots, v[j], repeat_32_wide(q + 4 * j));
            }
            acc[r] = _mm512_fmadd_ps(mw, _mm512_set1_ps(a.s[i]), acc[r]);
            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots),
                                     _mm512_mul_ps(dw, _mm512_set1_ps(a.d[i])), acc[r]);
        }
    }

    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(out + (row0 + r) * out_stride, acc[r]);
    }
}

inline __m512i pair(__m256i lo, __m256i hi) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
}

inline __m512 pair(__m256 lo, __m256 hi) {
    return _mm512_castsi512_ps(pair(_mm256_castps_si256(lo), _mm256_castps_si256(hi)));
}

template <typename BLOCK>
inline void values_of_pair(const BLOCK& w, const BLOCK& w2, int group, __m512i v[8]) {
    __m256i lo[8], hi[8];
    values(w, group, lo);
    values(w2, group, hi);
    for (int i = 0; i < 8; i++) {
        v[i] = pair(lo[i], hi[i]);
    }
}

// Sixteen columns of Q4_K or Q5_K: R rows from row0 on.
template <int R, typename BLOCK>
void dot_pair_with_minimum(const BLOCK* w, int64_t blocks, const Activations& a, int64_t row0,
                           float* out, size_t out_stride) {
    __m512 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm512_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        const BLOCK* w2 = w + blocks;
        const HalfFloats lo(*w), hi(*w2);
        for (int group = 0; group < GROUPS; group++) {
            prefetch(w, group);
            prefetch(w2, group);
            __m512i v[8];
            values_of_pair(*w, *w2, group, v);
            __m256 dw[2], mw[2];
            scales_of(w->scales[group / 2], group % 2, lo.d, lo.dmin, dw[0], mw[0]);
            scales_of(w2->scales[group / 2], group % 2, hi.d, hi.dmin, dw[1], mw[1]);
            const __m512 dws = pair(dw[0], dw[1]), mws = pair(mw[0], mw[1]);

            for (int r = 0; r < R; r++) {
                const int64_t i = (b * GROUPS + group) * a.rows + row0 + r;
                const int8_t* q = a.qs + i * QK8_0;
                __m512i dots = _mm512_setzero_si512();
                for (int j = 0; j < 8; j++) {
                    dots = _mm512_dpbusd_epi32(dots, v[j], repeat_32_wide(q + 4 * j));
                }
                acc[r] = _mm512_fmadd_ps(mws, _mm512_set1_ps(a.s[i]), acc[r]);
                acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots),
                                         _mm512_mul_ps(dws, _mm512_set1_ps(a.d[i])), acc[r]);
            }
        }
    }

    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(out + (row0 + r) * out_stride, acc[r]);
    }
}

template <int R>
void dot_pair(const columns_q4_K* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
              size_t out_stride) {
    dot_pair_with_minimum<R>(w, blocks, a, row0, out, out_stride);
}

template <int R>
void dot_pair(const columns_q5_K* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
              size_t out_stride) {
    dot_pair_with_minimum<R>(w, blocks, a, row0, out, out_stride);
}

// Sixteen columns: R rows from row0 on.
template <int R>
void dot_pair(const columns_q6_K* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
              size_t out_stride) {
    __m512 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm512_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        const columns_q6_K* w2 = w + blocks;
        const __m256 lo = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w->d));
        const __m256 hi = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)w2->d));
        for (int group = 0; group < GROUPS; group++) {
            prefetch(w, group);
            prefetch(w2, group);
            __m512i v[8];
            values_of_pair(*w, *w2, group, v);
            __m512 dw[2];
            for (int part = 0; part < 2; part++) {
                dw[part] = pair(scale_of_half(w->scales[group][part], lo),
                                scale_of_half(w2->scales[group][part], hi));
            }

            for (int r = 0; r < R; r++) {
                const int64_t i = (b * GROUPS + group) * a.rows + row0 + r;
                const int8_t* q = a.qs + i * QK8_0;
                const int32_t sums[2] = {a.half[i], a.offset[i] / 8 - a.half[i]};
                __m512 dots[2];
                for (int part = 0; part < 2; part++) {
                    __m512i sum = _mm512_set1_epi32(-32 * sums[part]);
                    for (int j = 4 * part; j < 4 * part + 4; j++) {
                        sum = _mm512_dpbusd_epi32(sum, v[j], repeat_32_wide(q + 4 * j));
                    }
                    dots[part] = _mm512_cvtepi32_ps(sum);
                }
                const __m512 both = _mm512_fmadd_ps(dw[1], dots[1], _mm512_mul_ps(dw[0], dots[0]));
                acc[r] = _mm512_fmadd_ps(both, _mm512_set1_ps(a.d[i]), acc[r]);
            }
        }
    }

    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(out + (row0 + r) * out_stride, acc[r]);
    }
}

// Sixteen columns: R rows from row0 on.
template <int R>
void dot_pair(const block_q8_0x8* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
              size_t out_stride) {
    const __m512i sign_bits = _mm512_set1_epi8((char)0x80);

    __m512 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm512_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        const block_q8_0x8* w2 = w + blocks;
        prefetch_block(w, sizeof(*w));
        prefetch_block(w2, sizeof(*w2));

        // Weights of -128..127 are taken as 0..255, the unsigned operand; 128 times the sum of the
        // activations is subtracted.
        __m512i v[8];
        for (int j = 0; j < 8; j++) {
            v[j] = _mm512_xor_si512(load_pair(w->qs + 32 * j, w2->qs + 32 * j), sign_bits);
        }
        const __m512 dw = load_pair_f16(w->d, w2->d);

        for (int r = 0; r < R; r++) {
            const int64_t i = b * a.rows + row0 + r;
            const int8_t* q = a.qs + i * QK8_0;
            __m512i dots = _mm512_set1_epi32(-16 * a.offset[i]);
            for (int j = 0; j < 8; j++) {
                dots = _mm512_dpbusd_epi32(dots, v[j], repeat_32_wide(q + 4 * j));
            }
            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots),
                                     _mm512_mul_ps(dw, _mm512_set1_ps(a.d[i])), acc[r]);
        }
    }

    for (int r = 0; r < R; r++) {
        _mm512_storeu_ps(out + (row0 + r) * out_stride, acc[r]);
    }
}
#endif

// One column: R rows from row0 on.
template <int R>
void dot(const block_q8_0* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    const __m256i ones = _mm256_set1_epi16(1);

    __m256 acc[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm256_setzero_ps();
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);

        // maddubs needs an unsigned operand: the activations take the weights' signs.
        const __m256i v = load_256(w->qs);
        const __m256i abs = _mm256_abs_epi8(v);
        const __m256 dw = _mm256_cvtph_ps(_mm_set1_epi16((short)w->d));

        for (int r = 0; r < R; r++) {
            const int64_t i = b * a.rows + row0 + r;
            const __m256i q = _mm256_sign_epi8(load_256(a.qs + i * QK8_0), v);
            const __m256i dots = _mm256_madd_epi16(_mm256_maddubs_epi16(abs, q), ones);
            acc[r] = _mm256_fmadd_ps(_mm256_mul_ps(dw, _mm256_set1_ps(a.d[i])),
                                     _mm256_cvtepi32_ps(dots), acc[r]);
        }
    }

    for (int r = 0; r < R; r++) {
        out[(row0 + r) * out_stride] = sum(acc[r]);
    }
}

// One column: R rows from row0 on.
template <int R>
void dot(const block_q4_1* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    const __m256i low_nibbles = _mm256_set1_epi8(15);
    const __m256i ones = _mm256_set1_epi16(1);

    __m256 acc[R];
    float offsets[R];
    for (int r = 0; r < R; r++) {
        acc[r] = _mm256_setzero_ps();
        offsets[r] = 0.0f;
    }

    for (int64_t b = 0; b < blocks; b++, w++) {
        _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);

        // Values 0..15 of the block are in the low nibbles, 16..31 in the high ones.
        const __m128i qs = _mm_loadu_si128((const __m128i*)w->qs);
        const __m256i v =
            _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(qs, 4), qs), low_nibbles);
        const float dw = GGML_CPU_FP16_TO_FP32(w->data.data.d);
        const float mw = GGML_CPU_FP16_TO_FP32(w->data.data.m);

        for (int r = 0; r < R; r++) {
            const int64_t i = b * a.rows + row0 + r;
            const __m256i dots =
                _mm256_madd_epi16(_mm256_maddubs_epi16(v, load_256(a.qs + i * QK8_0)), ones);
            acc[r] = _mm256_fmadd_ps(_mm256_set1_ps(dw * a.d[i]), _mm256_cvtepi32_ps(dots), acc[r]);
            offsets[r] += mw * a.s[i];
        }
    }

    for (int r = 0; r < R; r++) {
        out[(row0 + r) * out_stride] = sum(acc[r]) + offsets[r];
    }
}

// The kernel for `rows` rows of activations.
#define FEW_ROWS_DISPATCH(KERNEL)                                                                  \
    switch (rows) {                                                                                \
        case 1: return KERNEL<1>(w, blocks, a, row0, out, out_stride);                             \
        case 2: return KERNEL<2>(w, blocks, a, row0, out, out_stride);                             \
        case 3: return KERNEL<3>(w, blocks, a, row0, out, out_stride);                             \
        case 4: return KERNEL<4>(w, blocks, a, row0, out, out_stride);                             \
        case 5: return KERNEL<5>(w, blocks, a, row0, out, out_stride);                             \
        case 6: return KERNEL<6>(w, blocks, a, row0, out, out_stride);                             \
        case 7: return KERNEL<7>(w, blocks, a, row0, out, out_stride);                             \
        case 8: return KERNEL<8>(w, blocks, a, row0, out, out_stride);                             \
    }

template <typename BLOCK>
void dot(int rows, const BLOCK* w, int64_t blocks, const Activations& a, int64_t row0, float* out,
         size_t out_stride) {
    FEW_ROWS_DISPATCH(dot)
}

// Whether there is a kernel for two blocks, of sixteen columns.
template <typename BLOCK>
struct pairs {
    static constexpr bool exist = false;
};

#ifdef FEW_ROWS_PAIRS
template <>
struct pairs<block_q4_1x8> {
    static constexpr bool exist = true;
};
template <>
struct pairs<columns_q4_K> {
    static constexpr bool exist = true;
};
template <>
struct pairs<columns_q5_K> {
    static constexpr bool exist = true;
};
template <>
struct pairs<columns_q6_K> {
    static constexpr bool exist = true;
};
template <>
struct pairs<block_q8_0x8> {
    static constexpr bool exist = true;
};

template <typename BLOCK>
void dot_pair(int rows, const BLOCK* w, int64_t blocks, const Activations& a, int64_t row0,
              float* out, size_t out_stride) {
    FEW_ROWS_DISPATCH(dot_pair)
}
#endif

// COLS: columns of a BLOCK, VALUES: values of each.
template <typename BLOCK, int COLS, int VALUES = QK8_0>
void mul_mat(const ggml_compute_params* params, ggml_tensor* op) {
    const ggml_tensor* weights = op->src[0];
    const int64_t k = weights->ne[0];
    const int64_t cols = weights->ne[1];
    const int64_t rows = ggml_nrows(op->src[1]);
    const int64_t blocks = k / VALUES;

    Activations a(params->wdata, k, rows);
    a.quantize(op->src[1], k / QK8_0 * params->ith / params->nth,
               k / QK8_0 * (params->ith + 1) / params->nth);

    if (params->ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, params->nth);
    }
    ggml_barrier(params->threadpool);

    // A unit is one block of columns, or two that are computed together. Units are divided into
    // chunks of equal size, a multiple of the number of threads.
    const int64_t per_unit = pairs<BLOCK>::exist ? 2 : 1;
    const int64_t height = cols / COLS;
    const int64_t units = (height + per_unit - 1) / per_unit;
    const int64_t per_turn = params->nth * CHUNK_BYTES;
    const int64_t chunks =
        std::min(units, (int64_t)(ggml_nbytes(weights) + per_turn - 1) / per_turn * params->nth);

    for (int64_t chunk = params->ith; chunk < chunks;
         chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        // The chunk's weights are read from memory once, and from the cache for each further set.
        for (int64_t set = 0; set < rows; set += SET) {
            const int64_t set_rows = std::min((int64_t)SET, rows - set);
            const int64_t groups = (set_rows + GROUP - 1) / GROUP;
            for (int64_t unit = units * chunk / chunks; unit < units * (chunk + 1) / chunks;
                 unit++) {
                const int64_t u = unit * per_unit;
                const BLOCK* w = (const BLOCK*)weights->data + u * blocks;
                float* out = (float*)op->data + u * COLS;
                for (int64_t g = 0; g < groups; g++) {
                    const int64_t start = set + set_rows * g / groups;
                    const int64_t end = set + set_rows * (g + 1) / groups;
#ifdef FEW_ROWS_PAIRS
                    if constexpr (pairs<BLOCK>::exist) {
                        if (u + 1 < height) {
                            dot_pair(end - start, w, blocks, a, start, out,
                                     op->nb[1] / sizeof(float));
                            continue;
                        }
                    }
#endif
                    dot(end - start, w, blocks, a, start, out, op->nb[1] / sizeof(float));
                }
            }
        }
    }
}

void copy_scales(block_q4_1x8& out, int c, const block_q4_1& block) {
    out.d[c] = block.data.data.d;
    out.m[c] = block.data.data.m;
}

void copy_scales(block_q8_0x8& out, int c, const block_q8_0& block) { out.d[c] = block.d; }

// Interleaves the blocks of eight columns, four values of each in turn.
template <typename BLOCK, typename BLOCKx8>
void repack(ggml_tensor* t, const void* data, size_t data_size) {
    const int64_t blocks = t->ne[0] / QK8_0;
    GGML_ASSERT(data_size == (size_t)ggml_nrows(t) * blocks * sizeof(BLOCK));
    const BLOCK* in = (const BLOCK*)data;
    BLOCKx8* out = (BLOCKx8*)t->data;
    for (int64_t row = 0; row < ggml_nrows(t); row += 8, in += 8 * blocks) {
        for (int64_t b = 0; b < blocks; b++, out++) {
            for (int c = 0; c < 8; c++) {
                const BLOCK& block = in[c * blocks + b];
                copy_scales(*out, c, block);
                for (size_t i = 0; i < sizeof(block.qs) / 4; i++) {
                    memcpy(out->qs + 32 * i + 4 * c, block.qs + 4 * i, 4);
                }
            }
        }
    }
}

// A column's values as bytes from 0 on, its scales and its minima, group after group.
struct Unpacked {
    uint8_t q[QK_K];
    uint8_t scales[GROUPS], minima[GROUPS];

    // Twelve bytes have eight scales and eight minima of six bits.
    void unpack_scales(const uint8_t* p) {
        for (int g = 0; g < 4; g++) {
            scales[g] = p[g] & 63;
            minima[g] = p[g + 4] & 63;
            scales[g + 4] = (p[g + 8] & 15) | (p[g] >> 6 << 4);
            minima[g + 4] = (p[g + 8] >> 4) | (p[g + 4] >> 6 << 4);
        }
    }

    // A byte has a value of an even group and one of the next.
    void unpack_nibbles(const uint8_t* qs) {
        for (int j = 0; j < QK_K; j++) {
            q[j] = qs[j / 64 * 32 + j % 32] >> (j / 32 % 2 * 4) & 15;
        }
    }

    explicit Unpacked(const block_q4_K& block) {
        unpack_scales(block.scales);
        unpack_nibbles(block.qs);
    }

    explicit Unpacked(const block_q5_K& block) {
        unpack_scales(block.scales);
        unpack_nibbles(block.qs);
        for (int j = 0; j < QK_K; j++) {
            q[j] |= (block.qh[j % 32] >> j / 32 & 1) << 4;
        }
    }

    explicit Unpacked(const block_q6_K& block) {
        for (int j = 0; j < QK_K; j++) {
            const int half = j / 128, quarter = j / 32 % 4, l = j % 32;
            const int low = block.ql[half * 64 + quarter % 2 * 32 + l] >> quarter / 2 * 4 & 15;
            q[j] = low | (block.qh[half * 32 + l] >> quarter * 2 & 3) << 4;
        }
    }
};

// The upper bits of four values of a column, the i-th of its group.
void set_high(columns_q4_K&, int, int, int, int, uint8_t) {}

void set_high(columns_q5_K& out, int group, int c, int i, int t, uint8_t q) {
    out.qh[group][4 * c + t] |= (q >> 4) << i;
}

void set_high(columns_q6_K& out, int group, int c, int i, int t, uint8_t q) {
    out.qh[group][i / 4][4 * c + t] |= (q >> 4) << 2 * (i % 4);
}

template <typename BLOCK, typename BLOCKx8>
void copy_scales_K(BLOCKx8& out, int c, const BLOCK& block, const Unpacked& from) {
    if constexpr (std::is_same_v<BLOCK, block_q6_K>) {
        out.d[c] = block.d;
        for (int g = 0; g < GROUPS; g++) {
            out.scales[g][0][c] = block.scales[2 * g];
            out.scales[g][1][c] = block.scales[2 * g + 1];
        }
    } else {
        out.d[c] = block.data.data.d;
        out.dmin[c] = block.data.data.dmin;
        for (int g = 0; g < GROUPS; g++) {
            pair_of_scales& pair = out.scales[g / 2];
            const uint8_t scale = from.scales[g], minimum = from.minima[g];
            pair.low[g % 2][c] = (scale & 15) | minimum << 4;
            pair.high[c] |= (scale >> 4 | minimum >> 4 << 2) << 4 * (g % 2);
        }
    }
}

// Interleaves the blocks of 256 values of eight columns, four values of each in turn.
template <typename BLOCK, typename BLOCKx8>
void repack_K(ggml_tensor* t, const void* data, size_t data_size) {
    const int64_t blocks = t->ne[0] / QK_K;
    GGML_ASSERT(data_size == (size_t)ggml_nrows(t) * blocks * sizeof(BLOCK));
    const BLOCK* in = (const BLOCK*)data;
    BLOCKx8* out = (BLOCKx8*)t->data;
    for (int64_t row = 0; row < ggml_nrows(t); row += 8, in += 8 * blocks) {
        for (int64_t b = 0; b < blocks; b++, out++) {
            memset(out, 0, sizeof(*out));
            for (int c = 0; c < 8; c++) {
                const BLOCK& block = in[c * blocks + b];
                const Unpacked from(block);
                copy_scales_K(*out, c, block, from);
                for (int j = 0; j < QK_K; j++) {
                    const int group = j / 32, i = j % 32 / 4, t = j % 4;
                    out->qs[group][i % 4 * 32 + 4 * c + t] |= (from.q[j] & 15) << i / 4 * 4;
                    set_high(*out, group, c, i, t, from.q[j]);
                }
            }
        }
    }
}

} // namespace

bool ggml_few_rows_repacks(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_Q4_1:
        case GGML_TYPE_Q8_0:
        case GGML_TYPE_Q4_K:
        case GGML_TYPE_Q5_K:
        case GGML_TYPE_Q6_K: return true;
        default: return false;
    }
}

size_t ggml_few_rows_work_size(const ggml_tensor* op, bool repacked) {
    const ggml_tensor* weights = op->src[0];
    const ggml_tensor* src = op->src[1];
    const int64_t rows = ggml_nrows(src);

    const bool ours = repacked && ggml_few_rows_repacks(weights->type);
    const bool known = ours || weights->type == GGML_TYPE_Q8_0 || weights->type == GGML_TYPE_Q4_1 ||
                       (weights->type == GGML_TYPE_Q4_0 && repacked);
    const bool suits = known && src->type == GGML_TYPE_F32 && ggml_is_matrix(weights) &&
                       ggml_is_contiguous(weights) && src->nb[0] == sizeof(float) &&
                       ggml_is_contiguous(op);
    // ggml has no kernels for the layout of ggml_few_rows_repack.
    GGML_ASSERT(suits || !ours);
    return ours || (suits && rows <= MAX_ROWS) ? Activations::size(src->ne[0], rows) : 0;
}

bool ggml_few_rows_mul_mat(const ggml_compute_params* params, ggml_tensor* op, bool repacked) {
    if (ggml_few_rows_work_size(op, repacked) == 0) {
        return false;
    }
    switch (op->src[0]->type) {
        case GGML_TYPE_Q4_0: mul_mat<block_q4_0x8, 8>(params, op); break;
        case GGML_TYPE_Q4_1:
            repacked ? mul_mat<block_q4_1x8, 8>(params, op) : mul_mat<block_q4_1, 1>(params, op);
            break;
        case GGML_TYPE_Q4_K: mul_mat<columns_q4_K, 8, QK_K>(params, op); break;
        case GGML_TYPE_Q5_K: mul_mat<columns_q5_K, 8, QK_K>(params, op); break;
        case GGML_TYPE_Q6_K: mul_mat<columns_q6_K, 8, QK_K>(params, op); break;
        default:
            repacked ? mul_mat<block_q8_0x8, 8>(params, op) : mul_mat<block_q8_0, 1>(params, op);
    }
    return true;
}

void ggml_few_rows_repack(ggml_tensor* weights, const void* data, size_t data_size) {
    switch (weights->type) {
        case GGML_TYPE_Q4_1: return repack<block_q4_1, block_q4_1x8>(weights, data, data_size);
        case GGML_TYPE_Q4_K: return repack_K<block_q4_K, columns_q4_K>(weights, data, data_size);
        case GGML_TYPE_Q5_K: return repack_K<block_q5_K, columns_q5_K>(weights, data, data_size);
        case GGML_TYPE_Q6_K: return repack_K<block_q6_K, columns_q6_K>(weights, data, data_size);
        default: return repack<block_q8_0, block_q8_0x8>(weights, data, data_size);
    }
}

#else

bool ggml_few_rows_repacks(enum ggml_type) { return false; }

size_t ggml_few_rows_work_size(const ggml_tensor*, bool) { return 0; }

bool ggml_few_rows_mul_mat(const ggml_compute_params*, ggml_tensor*, bool) { return false; }

void ggml_few_rows_repack(ggml_tensor*, const void*, size_t) {
    GGML_ABORT("weights are repacked for kernels that this build does not have");
}

#endif
