// Matrix multiplications with a few rows of activations, as in verifying a drafted continuation
// or decoding a few streams: out[row][column] = sum over k of activations[row][k] *
// weights[column][k].
//
//   weights      cols x k, in blocks of 32 values (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL) or of 256
//                (Q2_K to Q6_K, IQ4_XS). Either stored as columns.h says, or Q4_1 and Q8_0 as a
//                file has them. F16 and BF16 are in floats.h.
//   activations  rows x k, F32; quantized to Q8_0 in the work buffer, once for each operation.
//   out          rows x cols, F32.
//
// Such a multiplication is bound by reading the weights from memory: 0.56 (Q4_0, Q4_K) to 1.06
// (Q8_0) bytes for each product of a row. So each block of weights is read from memory once for up
// to 32 rows, and unpacked once for as many rows as have their sums in registers: four with AVX2,
// eight with AVX512-VNNI. No kernel stores unpacked weights.
//
// A row's result does not depend, bit for bit, on the rows beside it, nor on the number of threads
// or the width of vectors: a group's products are summed exactly, in integers, and groups in F32 in
// the order of k.

#include "few-rows.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "quants.h"
#include "simd-mappings.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include "columns.h"
#include "floats.h"
#include "lanes.h"

namespace {

constexpr int MAX_ROWS = 512;          // of weights as a file has them; more are left to ggml
constexpr int SET = 32;                // rows whose activations stay in the L1 cache
constexpr int64_t CHUNK_BYTES = 32768; // of weights: what a thread takes at a time
constexpr int AHEAD = 2048;            // bytes of weights to prefetch

// What the indices of the IQ4 types stand for: as they are, and 128 more.
constexpr int8_t IQ4_VALUES[2][16] = {
    {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113},
    {1, 24, 45, 63, 79, 93, 106, 118, -127, -115, -103, -90, -75, -59, -39, -15},
};

// Activations, quantized in groups of 32 values. All rows of a group are adjacent in memory, since
// the kernels read them together.
struct Activations {
    int8_t* qs;    // [group][row][32]
    float* d;      // [group][row], the scale
    float* s;      // [group][row], d * the sum of qs
    int32_t* sum;  // [group][row], the sum of qs
    int32_t* half; // [group][row], the sum of the first 16 of qs
    int64_t rows;

    static size_t size(int64_t k, int64_t rows) {
        return k * rows + k / QK8_0 * rows * (2 * sizeof(float) + 2 * sizeof(int32_t));
    }

    Activations(void* data, int64_t k, int64_t rows) : rows(rows) {
        const int64_t n = k / QK8_0 * rows;
        qs = (int8_t*)data;
        d = (float*)(qs + k * rows);
        s = d + n;
        sum = (int32_t*)(s + n);
        half = sum + n;
    }

    // Groups start..end of all rows of src.
    void quantize(const ggml_tensor* src, int64_t start, int64_t end) {
        for (int64_t r = 0; r < rows; r++) {
            const int64_t r1 = r % src->ne[1], r2 = r / src->ne[1] % src->ne[2],
                          r3 = r / (src->ne[1] * src->ne[2]);
            const float* x = (const float*)((const char*)src->data + r1 * src->nb[1] +
                                            r2 * src->nb[2] + r3 * src->nb[3]);
            for (int64_t g = start; g < end; g++) {
                block_q8_0 q;
                quantize_row_q8_0(x + g * QK8_0, &q, QK8_0);
                const int64_t i = g * rows + r;
                int32_t all = 0;
                for (int j = 0; j < QK8_0; j++) {
                    if (j == QK8_0 / 2) {
                        half[i] = all;
                    }
                    all += q.qs[j];
                }
                memcpy(qs + i * QK8_0, q.qs, QK8_0);
                d[i] = GGML_CPU_FP16_TO_FP32(q.d);
                s[i] = d[i] * all;
                sum[i] = all;
            }
        }
    }
};

inline __m256i load_256(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

// The I-th four values of a group, of each column: from 0 on, or as they are where L multiplies
// values of either sign.
template <int I, typename L, typename Columns>
FEW_ROWS_INLINE inline typename L::Ints unpack(const L& lanes, const Columns& w, int group) {
    using Ints = typename L::Ints;
    constexpr int UP = Columns::LOW_BITS;
    if constexpr (UP == 8) {
        const Ints v = lanes.load(w.qs[group] + 32 * I);
        return L::IS_SIGNED ? v : L::differ(v, L::bytes(Columns::OFFSET));
    } else {
        constexpr int EACH = 8 / UP; // fours in a vector
        constexpr int FIRST = UP == 4 ? I % 4 : I / EACH, PLACE = UP == 4 ? I / 4 : I % EACH;
        const Ints q = lanes.load(w.qs[group] + 32 * FIRST);
        const Ints low = L::both(L::template shift<-UP * PLACE>(q), L::bytes((1 << UP) - 1));
        if constexpr (Columns::IS_INDEX) {
            return L::look_up(low, IQ4_VALUES[!L::IS_SIGNED]);
        } else if constexpr (Columns::HIGH_BITS == 1) {
            const Ints h = lanes.load(w.qh[group]);
            return L::either(low, L::both(L::template shift<UP - I>(h), L::bytes(1 << UP)));
        } else if constexpr (Columns::HIGH_BITS == 2) {
            const Ints h = lanes.load(w.qh[group][I / 4]);
            constexpr int BY = UP - 2 * (I % 4);
            return L::either(low, L::both(L::template shift<BY>(h), L::bytes(3 << UP)));
        } else {
            return low;
        }
    }
}

// What a block's scales are multiplied with, and a group's scales: d for each part, and m, which is
// added to its values.
template <typename L, typename Columns>
struct Scales {
    using Ints = typename L::Ints;
    using Floats = typename L::Floats;
    Floats block_d, block_m, d[Columns::PARTS], m[Columns::PARTS];

    FEW_ROWS_INLINE void set_block(const L& lanes, const Columns& w) {
        block_d = lanes.load_halves(w.d);
        if constexpr (Columns::HAS_MINIMUM) {
            block_m = lanes.load_halves(w.m);
            block_m = Columns::GROUPS > 1 ? L::negate(block_m) : block_m;
        }
    }

    // Scales of six bits: `low` and `high` have the bits wanted from bit 0 and from bit `shift` on.
    FEW_ROWS_INLINE static Ints six_bits(Ints low, Ints high, int shift) {
        const Ints bits = L::shift_right(high, shift);
        return L::either(L::both(low, L::ints(15)),
                         L::both(L::template shift<4>(bits), L::ints(0x30)));
    }

    FEW_ROWS_INLINE void set_group(const L& lanes, const Columns& w, int group) {
        const auto scaled = [](Floats by, Ints scale)
                                FEW_ROWS_INLINE { return L::mul(by, L::to_floats(scale)); };
        if constexpr (Columns::GROUPS == 1) {
            d[0] = block_d;
            if constexpr (Columns::HAS_MINIMUM) {
                m[0] = block_m;
            }
        } else if constexpr (std::is_same_v<Columns, columns_q6_K>) {
            unroll<2>([&](auto part) FEW_ROWS_INLINE {
                d[part] = scaled(block_d, lanes.load_bytes(w.scales[group][part]));
            });
        } else if constexpr (std::is_same_v<Columns, columns_q2_K>) {
            unroll<2>([&](auto part) FEW_ROWS_INLINE {
                const Ints both = lanes.load_bytes(w.scales[group][part]);
                d[part] = scaled(block_d, L::both(both, L::ints(15)));
                m[part] = scaled(block_m, L::template shift<-4>(both));
            });
        } else if constexpr (std::is_same_v<Columns, columns_q3_K>) {
            const Ints low = lanes.load_bytes(w.scales[group]);
            const Ints high = lanes.load_bytes(w.scales_high[group / 2]);
            const int shift = group % 2 * 4;
            d[0] = scaled(block_d, L::subtract(six_bits(low, high, shift), L::ints(32)));
            d[1] =
                scaled(block_d, L::subtract(six_bits(L::template shift<-4>(low), high, shift + 2),
                                            L::ints(32)));
        } else if constexpr (std::is_same_v<Columns, columns_iq4_xs>) {
            const Ints low = L::shift_right(lanes.load_bytes(w.scales[group / 2]), group % 2 * 4);
            const Ints high = lanes.load_bytes(w.scales_high[group / 4]);
            d[0] = scaled(block_d, L::subtract(six_bits(low, high, group % 4 * 2), L::ints(32)));
        } else {
            const pair_of_scales& pair = w.scales[group / 2];
            const Ints low = lanes.load_bytes(pair.low[group % 2]);
            const Ints high = lanes.load_bytes(pair.high);
            const int shift = group % 2 * 4;
            d[0] = scaled(block_d, six_bits(low, high, shift));
            m[0] = scaled(block_m, six_bits(L::template shift<-4>(low), high, shift + 2));
        }
    }
};

// V vectors of columns, from the block at w on: R rows from row0 on. Of the last vectors those from
// n_vectors on are computed from the first one's weights and not written.
//
// An activation that is broadcast is multiplied with V vectors of weights, and these with R
// activations: fewer loads than multiplications.
template <typename L, int V, int R, typename Columns>
FEW_ROWS_KERNEL void dot(const Columns* w, int n_vectors, int64_t blocks, const Activations& a,
                         int64_t row0, float* out, size_t out_stride) {
    using Ints = typename L::Ints;
    using Floats = typename L::Floats;
    constexpr int PARTS = Columns::PARTS, FOURS = 8 / PARTS;
    constexpr bool IS_SIGNED = L::IS_SIGNED && Columns::MOST == 255;
    constexpr int OFFSET = IS_SIGNED ? 0 : Columns::OFFSET;
    constexpr int LINES = (sizeof(Columns) / Columns::GROUPS + 63) / 64;
    const L lanes(blocks * sizeof(Columns));

    const Columns* weights[V];
    Floats acc[V][R];
    for (int n = 0; n < V; n++) {
        weights[n] = w + (n < n_vectors ? n : 0) * L::BLOCKS * blocks;
        for (int r = 0; r < R; r++) {
            acc[n][r] = L::zero_floats();
        }
    }

    for (int64_t b = 0; b < blocks; b++) {
        Scales<L, Columns> scales[V];
        for (int n = 0; n < V; n++) {
            scales[n].set_block(lanes, weights[n][b]);
        }
        for (int group = 0; group < Columns::GROUPS; group++) {
            for (int n = 0; n < V; n++) {
                for (int block = 0; block < L::BLOCKS; block++) {
                    const char* ahead = (const char*)(weights[n] + b + block * blocks) + AHEAD;
                    for (int line = 0; line < LINES; line++) {
                        _mm_prefetch(ahead + (group * LINES + line) * 64, _MM_HINT_T0);
                    }
                }
            }
            const int64_t first = (b * Columns::GROUPS + group) * a.rows + row0;
            const int8_t* q = a.qs + first * QK8_0;
            typename L::template Dot<Columns::MOST> dots[PARTS][V][R];
            unroll<8>([&](auto i) FEW_ROWS_INLINE {
                Ints v[V];
                unroll<V>([&](auto n)
                              FEW_ROWS_INLINE { v[n] = unpack<i>(lanes, weights[n][b], group); });
                unroll<R>([&](auto r) FEW_ROWS_INLINE {
                    const Ints x = L::repeat(q + r * QK8_0 + 4 * i);
                    unroll<V>([&](auto n) FEW_ROWS_INLINE {
                        dots[i / FOURS][n][r].template add<i % FOURS, FOURS>(v[n], x);
                    });
                });
            });
            unroll<V>([&](auto n) FEW_ROWS_INLINE {
                scales[n].set_group(lanes, weights[n][b], group);
                unroll<R>([&](auto r) FEW_ROWS_INLINE {
                    const int64_t i = first + r;
                    Floats& to = acc[n][r];
                    if constexpr (PARTS == 2) {
                        const int32_t sums[2] = {a.half[i], a.sum[i] - a.half[i]};
                        Ints products[2];
                        unroll<2>([&](auto part) FEW_ROWS_INLINE {
                            products[part] = dots[part][n][r].sum;
                            if constexpr (OFFSET > 0) {
                                const Ints less = L::ints(OFFSET * sums[part]);
                                products[part] = L::subtract(products[part], less);
                            }
                        });
                        Floats all = L::mul(scales[n].d[0], L::to_floats(products[0]));
                        all = L::mul_add(scales[n].d[1], L::to_floats(products[1]), all);
                        if constexpr (Columns::HAS_MINIMUM) {
                            all = L::mul_add(scales[n].m[0], L::to_floats(L::ints(sums[0])), all);
                            all = L::mul_add(scales[n].m[1], L::to_floats(L::ints(sums[1])), all);
                        }
                        to = L::mul_add(all, L::floats(a.d + i), to);
                    } else {
                        Ints products = dots[0][n][r].sum;
                        if constexpr (OFFSET > 0) {
                            products = L::subtract(products, L::ints(OFFSET * a.sum[i]));
                        }
                        if constexpr (Columns::HAS_MINIMUM) {
                            to = L::mul_add(scales[n].m[0], L::floats(a.s + i), to);
                        }
                        const Floats d = L::mul(scales[n].d[0], L::floats(a.d + i));
                        to = L::mul_add(L::to_floats(products), d, to);
                    }
                });
            });
        }
    }

    for (int n = 0; n < std::min(V, n_vectors); n++) {
        for (int r = 0; r < R; r++) {
            L::store(out + (row0 + r) * out_stride + n * L::BLOCKS * COLS, acc[n][r]);
        }
    }
}

// One column as a file has it: R rows from row0 on.
template <int R>
FEW_ROWS_KERNEL void dot_column(const block_q8_0* w, int64_t blocks, const Activations& a,
                                int64_t row0, float* out, size_t out_stride) {
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

// One column as a file has it: R rows from row0 on.
template <int R>
FEW_ROWS_KERNEL void dot_column(const block_q4_1* w, int64_t blocks, const Activations& a,
                                int64_t row0, float* out, size_t out_stride) {
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
        const float dw = GGML_CPU_FP16_TO_FP32(w->d);
        const float mw = GGML_CPU_FP16_TO_FP32(w->m);

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

// What is computed together: of the file's layout one column, else two blocks of columns; and as
// many rows as have room in the registers.
template <typename W>
constexpr bool IS_COLUMN = std::is_same_v<W, block_q4_1> || std::is_same_v<W, block_q8_0>;

constexpr int BLOCKS = 2;
constexpr int FEW = 4; // rows for which there is a kernel each
template <typename W>
constexpr int MANY = IS_COLUMN<W> || sizeof(Lanes::Ints) == 64 ? 8 : FEW;

// How many of so many rows to compute together.
template <typename W>
int64_t together(int64_t rows) {
    return rows > FEW && rows < 2 * FEW ? (rows + 1) / 2 : std::min<int64_t>(MANY<W>, rows);
}

// Calls f with the number of rows as a type: up to FEW, or MANY.
template <typename W, typename F>
inline void with_rows(int rows, F f) {
    unroll<FEW>([&](auto i) {
        if (rows == i + 1) {
            f(std::integral_constant<int, i + 1>{});
        }
    });
    if (MANY<W> > FEW && rows == MANY<W>) {
        f(std::integral_constant<int, MANY<W>>{});
    }
}

template <typename W>
void dot_unit(int rows, int n_blocks, const W* w, int64_t blocks, const Activations& a,
              int64_t row0, float* out, size_t out_stride) {
    if constexpr (!IS_COLUMN<W> && Lanes::BLOCKS > 1) {
        if (n_blocks < Lanes::BLOCKS) { // rare: too few columns for a vector
            for (int r = 0; r < rows; r++) {
                dot<Lanes8, 1, 1>(w, 1, blocks, a, row0 + r, out, out_stride);
            }
            return;
        }
    }
    with_rows<W>(rows, [&](auto n) {
        constexpr int R = n;
        if constexpr (IS_COLUMN<W>) {
            dot_column<R>(w, blocks, a, row0, out, out_stride);
        } else {
            constexpr int V = BLOCKS / Lanes::BLOCKS;
            dot<Lanes, V, R>(w, n_blocks / Lanes::BLOCKS, blocks, a, row0, out, out_stride);
        }
    });
}

// A block is of N columns and VALUES values of each.
template <typename W, int N, int VALUES>
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

    // A unit is what is computed together. Units are divided into chunks of equal size, a multiple
    // of the number of threads.
    const int64_t per_unit = IS_COLUMN<W> ? 1 : BLOCKS;
    const int64_t height = cols / N;
    const int64_t units = (height + per_unit - 1) / per_unit;
    const int64_t per_turn = params->nth * CHUNK_BYTES;
    const int64_t chunks =
        std::min(units, (int64_t)(ggml_nbytes(weights) + per_turn - 1) / per_turn * params->nth);

    for (int64_t chunk = params->ith; chunk < chunks;
         chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
        // The chunk's weights are read from memory once, and from the cache for each further set.
        for (int64_t set = 0; set < rows; set += SET) {
            const int64_t end = std::min(rows, set + SET);
            for (int64_t unit = units * chunk / chunks; unit < units * (chunk + 1) / chunks;
                 unit++) {
                const int64_t u = unit * per_unit;
                const int n_blocks = std::min(per_unit, height - u);
                const W* w = (const W*)weights->data + u * blocks;
                float* out = (float*)op->data + u * N;
                int64_t n = 0;
                for (int64_t row = set; row < end; row += n) {
                    n = together<W>(end - row);
                    dot_unit(n, n_blocks, w, blocks, a, row, out, op->nb[1] / sizeof(float));
                }
            }
        }
    }
}

// Calls f with a value of the columns of a type; returns false for a type that has none.
template <typename F>
bool with_columns(ggml_type type, F f) {
    switch (type) {
        case GGML_TYPE_Q4_0: f(columns_q4_0{}); return true;
        case GGML_TYPE_Q4_1: f(columns_q4_1{}); return true;
        case GGML_TYPE_Q5_0: f(columns_q5_0{}); return true;
        case GGML_TYPE_Q5_1: f(columns_q5_1{}); return true;
        case GGML_TYPE_Q8_0: f(columns_q8_0{}); return true;
        case GGML_TYPE_IQ4_NL: f(columns_iq4_nl{}); return true;
        case GGML_TYPE_IQ4_XS: f(columns_iq4_xs{}); return true;
        case GGML_TYPE_Q2_K: f(columns_q2_K{}); return true;
        case GGML_TYPE_Q3_K: f(columns_q3_K{}); return true;
        case GGML_TYPE_Q4_K: f(columns_q4_K{}); return true;
        case GGML_TYPE_Q5_K: f(columns_q5_K{}); return true;
        case GGML_TYPE_Q6_K: f(columns_q6_K{}); return true;
        default: return false;
    }
}

} // namespace

bool ggml_few_rows_repacks(enum ggml_type type) {
    return with_columns(type, [](auto) {});
}

size_t ggml_few_rows_work_size(const ggml_tensor* op, bool repacked) {
    const ggml_tensor* weights = op->src[0];
    const ggml_tensor* src = op->src[1];
    const int64_t rows = ggml_nrows(src);

    const bool is_float = weights->type == GGML_TYPE_F16 || weights->type == GGML_TYPE_BF16;
    const bool known = repacked || weights->type == GGML_TYPE_Q8_0 ||
                       weights->type == GGML_TYPE_Q4_1 ||
                       (is_float && weights->ne[0] % FLOAT_LANES == 0);
    const bool suits = known && src->type == GGML_TYPE_F32 && ggml_is_matrix(weights) &&
                       ggml_is_contiguous(weights) && src->nb[0] == sizeof(float) &&
                       ggml_is_contiguous(op);
    // ggml has no kernels for these layouts.
    GGML_ASSERT(suits || !repacked);
    return suits && (repacked || rows <= MAX_ROWS) ? Activations::size(src->ne[0], rows) : 0;
}

bool ggml_few_rows_mul_mat(const ggml_compute_params* params, ggml_tensor* op, bool repacked) {
    if (ggml_few_rows_work_size(op, repacked) == 0) {
        return false;
    }
    if (repacked) {
        return with_columns(op->src[0]->type, [&](auto columns) {
            using Columns = decltype(columns);
            mul_mat<Columns, COLS, 32 * Columns::GROUPS>(params, op);
        });
    }
    switch (op->src[0]->type) {
        case GGML_TYPE_F16: mul_mat_floats<ggml_fp16_t>(params, op, CHUNK_BYTES); break;
        case GGML_TYPE_BF16: mul_mat_floats<ggml_bf16_t>(params, op, CHUNK_BYTES); break;
        case GGML_TYPE_Q4_1: mul_mat<block_q4_1, 1, QK4_1>(params, op); break;
        default: mul_mat<block_q8_0, 1, QK8_0>(params, op); break;
    }
    return true;
}

void ggml_few_rows_repack(ggml_tensor* weights, const void* data, size_t data_size) {
    GGML_ASSERT(data_size == ggml_nbytes(weights) && ggml_nrows(weights) % COLS == 0);
    with_columns(weights->type, [&](auto columns) {
        repack<decltype(columns)>(weights->data, data, ggml_nrows(weights), weights->ne[0]);
    });
}

#else

bool ggml_few_rows_repacks(enum ggml_type) { return false; }

size_t ggml_few_rows_work_size(const ggml_tensor*, bool) { return 0; }

bool ggml_few_rows_mul_mat(const ggml_compute_params*, ggml_tensor*, bool) { return false; }

void ggml_few_rows_repack(ggml_tensor*, const void*, size_t) {
    GGML_ABORT("weights are repacked for kernels that this build does not have");
}

#endif
