// Flash attention for one KV head at a time: out[i][h] = softmax(scale * q[i][h] . K + mask[i]) V.
//
//   q     n_q x n_head x DK, F32, for each stream
//   K, V  n_cells x n_kv_head x DK or DV, of any type that ggml reads: the cells of the cache
//   mask  n_q x n_cells, F16, or none; -infinity for a cell that the row does not see
//   sinks n_head, F32, or none: scores without a value
//   out   n_q x n_head x DV, F32. Scores exist for 64 cells at a time, and never in memory as a
//         whole; keys and values in F16 are converted to F32 in registers, those of other types
//         for a block of cells at a time, which all rows of a group then read.
//
// Decoding reads 2*(DK + DV) bytes of F16 cache for each cell and KV head, and computes little with
// them. So the query rows of all heads that part a KV head (grouped-query attention) read a cell
// once, for as many rows at a time as the registers hold. A cell that no row of a group sees is not
// read, wherever it is: in a cache that many sequences part, each pays for its own cells and for
// reading its mask, and a few rows of one sequence (a drafted tree, a part of a prompt) cost little
// more than one.
//
// Cells are far apart in memory, more so with many KV heads, and the processor foresees none of
// them: a cell is fetched into the second-level cache well before it is read. Without that a row
// over 32,768 cells takes three times as long.
//
// The work is divided into items: (stream, KV head, tile of query rows). The cells that a row sees,
// in their order, are divided into chunks; the sums over each chunk are merged in that order, as in
// https://arxiv.org/pdf/2112.05682. Adjacent rows of a tile that see about the same cells form a
// group: chunks that are equal for all of them are computed together, the others row by row. Where
// there are fewer than four tiles for a thread, an item is a part of a tile's chunks; a long one of
// all KV heads one after another, as they lie beside each other in a cell.
//
// So a row's result does not depend, bit for bit, on where in the cache its cells are, only on
// their order, nor on the rows beside it nor on the number of threads.

#include "attention.h"

#include "ggml-cpu.h"
#include "ggml-impl.h"
#include "quants.h"
#include "simd-mappings.h"
#include "vec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)) ||        \
    (defined(__ARM_NEON) && defined(__aarch64__) && !defined(__ARM_FEATURE_SVE))

namespace {

constexpr int BLOCK = 64;      // cells whose scores are kept at a time
constexpr int TILE_ROWS = 24;  // query rows x heads of a tile
constexpr int LANES = 16;      // the most F32 values of a vector
constexpr int CACHE_LINE = 16; // F32 values
constexpr int EPR = GGML_F32_EPR;
constexpr int KEYS_AT_ONCE = 4; // in registers
constexpr int64_t AHEAD_BYTES = 1 << 17; // of keys and values, to fetch ahead

// Query rows for which a cell's values are in registers at a time: as many as there are registers
// for the sums of four vectors each.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int ROWS_AT_ONCE = 6;
#else
constexpr int ROWS_AT_ONCE = 3;
#endif

// A set of sums is over a chunk of the cells that a row sees, in their order: few cells, so that
// threads can divide a short row among them, then more, so that a long row has not too many sums.
constexpr int64_t SHORT_CHUNK = 128, LONG_CHUNK = 512, SHORT_CHUNKS = 16;

static_assert(SHORT_CHUNK % BLOCK == 0 && LONG_CHUNK % BLOCK == 0 && BLOCK % LANES == 0,
              "whole blocks and vectors");

// The first cell of a chunk.
inline int64_t chunk_start(int64_t i) {
    return i < SHORT_CHUNKS ? i * SHORT_CHUNK
                            : SHORT_CHUNKS * SHORT_CHUNK + (i - SHORT_CHUNKS) * LONG_CHUNK;
}

// The number of chunks that end within the first n cells.
inline int64_t whole_chunks(int64_t n) {
    const int64_t n_long = n - SHORT_CHUNKS * SHORT_CHUNK;
    return n_long < 0 ? n / SHORT_CHUNK : SHORT_CHUNKS + n_long / LONG_CHUNK;
}

// The number of chunks of n cells, the last of which may not be whole.
inline int64_t chunks(int64_t n) {
    const int64_t whole = whole_chunks(n);
    return whole + (chunk_start(whole) < n);
}

// The sums of four vectors, to out[0..4].
inline void sum4(float* out, const GGML_F32_VEC* v) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512 x = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44),
                                   _mm512_shuffle_ps(ab, cd, 0xEE)); // a b c d in each lane
    const __m256 y =
        _mm256_add_ps(_mm512_castps512_ps256(x),
                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1)));
#elif defined(__AVX2__)
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
#else
    for (int i = 0; i < 4; i++) {
        out[i] = vaddvq_f32(v[i]);
    }
#endif
}

// Fetches bytes that will be read later into the second-level cache.
inline void fetch(const char* data, size_t n) {
    for (size_t i = 0; i < n; i += 64) {
        __builtin_prefetch(data + i, 0, 2);
    }
}

// Keys or values of one KV head, d of each of n cells. More are listed after them: as many as are
// fetched ahead, and those that fill up the last KEYS_AT_ONCE.
template <typename T>
struct Rows {
    const char* data;
    size_t stride;
    int64_t d;
    const int* cell;
    int n, ahead;

    const T* at(int k) const { return (const T*)(data + cell[k] * stride); }
    void fetch_after(int k) const { fetch((const char*)at(k + ahead), d * sizeof(T)); }
};

inline GGML_F32_VEC load(const float* x) { return GGML_F32_VEC_LOAD(x); }

inline GGML_F32_VEC load(const ggml_fp16_t* x) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)x));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
#else
    return vcvt_f32_f16(vld1_f16((const __fp16*)x));
#endif
}

// d values of Q8_0, a multiple of 32.
inline void to_float(const block_q8_0* x, float* out, int64_t d) {
    for (int64_t i = 0; i < d / QK8_0; i++) {
        const float scale = GGML_CPU_FP16_TO_FP32(x[i].d);
#if defined(__AVX2__)
        const __m256 scales = _mm256_set1_ps(scale);
        for (int j = 0; j < QK8_0; j += 8) {
            const __m256i q = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(x[i].qs + j)));
            _mm256_storeu_ps(out + i * QK8_0 + j, _mm256_mul_ps(_mm256_cvtepi32_ps(q), scales));
        }
#else
        for (int j = 0; j < QK8_0; j++) {
            out[i * QK8_0 + j] = x[i].qs[j] * scale;
        }
#endif
    }
}

// Keys or values of n cells as F32, to `out`.
inline void to_float(const ggml_tensor* t, const char* data, const int* cell, int n, int ahead,
                     float* out) {
    const int64_t d = t->ne[0];
    const auto any = ggml_get_type_traits(t->type)->to_float;
    const size_t n_bytes = ggml_row_size(t->type, d);
    for (int k = 0; k < n; k++) {
        const char* x = data + cell[k] * t->nb[1];
        fetch(data + cell[k + ahead] * t->nb[1], n_bytes);
        if (t->type == GGML_TYPE_Q8_0) {
            to_float((const block_q8_0*)x, out + k * d, d);
        } else {
            any(x, out + k * d, d);
        }
    }
}

// Types that are read where they are.
inline bool in_place(ggml_type type) { return type == GGML_TYPE_F16 || type == GGML_TYPE_F32; }

// score[r][k] = q[r] . keys[k] for NR rows and all keys. Writes a multiple of four scores a row.
template <int NR, bool FETCH, typename T>
[[gnu::noinline]] void scores(float* const* score, const float* const* q, const Rows<T>& keys) {
    const int n = keys.n;
    const int64_t DK = keys.d;
    for (int k = 0; k < n; k += 4) {
        const T* key[4];
        for (int j = 0; j < 4; j++) {
            key[j] = keys.at(k + j);
            if (FETCH) {
                keys.fetch_after(k + j);
            }
        }
        GGML_F32_VEC acc[NR][4];
        for (int r = 0; r < NR; r++) {
            for (int j = 0; j < 4; j++) {
                acc[r][j] = GGML_F32_VEC_ZERO;
            }
        }
        for (int64_t d = 0; d < DK; d += EPR) {
            GGML_F32_VEC kv[4];
            for (int j = 0; j < 4; j++) {
                kv[j] = load(key[j] + d);
            }
            for (int r = 0; r < NR; r++) {
                const GGML_F32_VEC qv = GGML_F32_VEC_LOAD(q[r] + d);
                for (int j = 0; j < 4; j++) {
                    acc[r][j] = GGML_F32_VEC_FMA(acc[r][j], kv[j], qv);
                }
            }
        }
        for (int r = 0; r < NR; r++) {
            sum4(score[r] + k, acc[r]);
        }
    }
}

// out[r] += sum over cells of weight[r][k] * value[k]: NV vectors of it, from d on.
template <int NR, int NV, bool FETCH, typename T>
[[gnu::noinline]] void add_vectors(float* const* out, const float* const* weight,
                                   const Rows<T>& values, int64_t d) {
    const int n = values.n;
    GGML_F32_VEC acc[NR][NV];
    const float* w[NR];
    for (int r = 0; r < NR; r++) {
        w[r] = weight[r];
        for (int j = 0; j < NV; j++) {
            acc[r][j] = GGML_F32_VEC_LOAD(out[r] + d + j * EPR);
        }
    }
    for (int k = 0; k < n; k++) {
        const T* value = values.at(k) + d;
        if (FETCH) {
            values.fetch_after(k);
        }
        GGML_F32_VEC v[NV];
        for (int j = 0; j < NV; j++) {
            v[j] = load(value + j * EPR);
        }
        for (int r = 0; r < NR; r++) {
            const GGML_F32_VEC weights = GGML_F32_VEC_SET1(w[r][k]);
            for (int j = 0; j < NV; j++) {
                acc[r][j] = GGML_F32_VEC_FMA(acc[r][j], v[j], weights);
            }
        }
    }
    for (int r = 0; r < NR; r++) {
        for (int j = 0; j < NV; j++) {
            GGML_F32_VEC_STORE(out[r] + d + j * EPR, acc[r][j]);
        }
    }
}

template <int NR, bool FETCH, typename T>
void add_values(float* const* out, const float* const* weight, const Rows<T>& values) {
    int64_t d = 0;
    for (; d + 4 * EPR <= values.d; d += 4 * EPR) {
        d == 0 ? add_vectors<NR, 4, FETCH>(out, weight, values, d)
               : add_vectors<NR, 4, false>(out, weight, values, d);
    }
    for (; d < values.d; d += EPR) {
        add_vectors<NR, 1, false>(out, weight, values, d);
    }
}

// Calls `each` with a constant number of rows at a time, and the first of them, for n rows.
template <int NR = ROWS_AT_ONCE, typename Each>
void in_registers(int n, const Each& each, int first = 0) {
    for (; n - first >= NR; first += NR) {
        each(std::integral_constant<int, NR>(), first);
    }
    if constexpr (NR > 1) {
        in_registers<NR - 1>(n, each, first);
    }
}

// Sets bit k if the row sees cell k, and returns how many it sees: all if mask is nullptr.
inline int visible(const ggml_fp16_t* mask, int n, uint64_t* bits) {
    const ggml_fp16_t minus_infinity = 0xFC00;
    int seen = 0;
    for (int k = 0; k < n; k += 64) {
        const int m = std::min(64, n - k);
        uint64_t word = m == 64 ? ~0ull : (1ull << m) - 1;
        if (mask) {
            const ggml_fp16_t* at = mask + k;
            int j = 0;
            uint64_t masked = 0;
#if defined(__AVX2__)
            const __m256i inf = _mm256_set1_epi16((short)minus_infinity);
            for (; j + 32 <= m; j += 32) {
                const __m256i a =
                    _mm256_cmpeq_epi16(_mm256_loadu_si256((const __m256i*)(at + j)), inf);
                const __m256i b =
                    _mm256_cmpeq_epi16(_mm256_loadu_si256((const __m256i*)(at + j + 16)), inf);
                const __m256i ab = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xD8);
                masked |= (uint64_t)(uint32_t)_mm256_movemask_epi8(ab) << j;
            }
#endif
            for (; j < m; j++) {
                masked |= (uint64_t)(at[j] == minus_infinity) << j;
            }
            word &= ~masked;
        }
        bits[k / 64] = word;
        seen += __builtin_popcountll(word);
    }
    return seen;
}

// The largest of n values, a multiple of LANES, without those that are not numbers.
inline float max_of(const float* x, int n) {
#if defined(__AVX512F__)
    __m512 most = _mm512_set1_ps(-INFINITY);
    for (int k = 0; k < n; k += 16) {
        most = _mm512_max_ps(_mm512_loadu_ps(x + k), most);
    }
    return _mm512_reduce_max_ps(most);
#elif defined(__AVX2__)
    __m256 most = _mm256_set1_ps(-INFINITY);
    for (int k = 0; k < n; k += 8) {
        most = _mm256_max_ps(_mm256_loadu_ps(x + k), most);
    }
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(most), _mm256_extractf128_ps(most, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
#else
    float32x4_t most = vdupq_n_f32(-INFINITY);
    for (int k = 0; k < n; k += 4) {
        most = vmaxnmq_f32(vld1q_f32(x + k), most);
    }
    return vmaxnmvq_f32(most);
#endif
}

// The operation: tensors, shapes, parameters, and how the work is divided.
struct Op {
    const ggml_tensor *q, *k, *v, *mask, *sinks, *dst;
    int64_t DK, DV, n_q, n_cells, n_head, n_streams, group, kv_group3;
    int64_t tile_heads, tile_q, head_tiles, q_tiles, item_kv_heads, n_parts, max_chunks, words;
    int64_t ahead; // cells to fetch ahead
    float scale, max_bias, softcap, m0, m1;
    uint32_t n_head_log2;

    float slope(int64_t h) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        return h < n_head_log2 ? powf(m0, h + 1) : powf(m1, 2 * (h - n_head_log2) + 1);
    }

    int64_t n_rows() const { return tile_q * tile_heads; }
    int64_t n_kv_head() const { return n_head / group; }
    int64_t n_items() const {
        return n_streams * (n_kv_head() / item_kv_heads) * head_tiles * q_tiles * n_parts;
    }
    // Floats of a thread's scratch memory: see Tile.
    size_t scratch() const {
        const int64_t converted = (in_place(k->type) ? 0 : DK) + (in_place(v->type) ? 0 : DV);
        return n_rows() * (DK + BLOCK + 2 * (DV + 2)) + BLOCK * (1 + converted) + 6 * words +
               n_cells + ahead + KEYS_AT_ONCE + 2 * CACHE_LINE;
    }
    // Floats of the sums of all chunks, where threads divide them.
    size_t partials() const {
        return n_parts > 1 ? n_streams * n_q * n_head * (1 + max_chunks * (2 + DV)) : 0;
    }

    // The number of chunks of a query row and head.
    float* n_partials(float* base, int64_t i3, int64_t i1, int64_t h) const {
        return base + ((i3 * n_q + i1) * n_head + h) * (1 + max_chunks * (2 + DV));
    }

    // The sums of a chunk.
    float* partial(float* base, int64_t i3, int64_t i1, int64_t h, int64_t chunk) const {
        return n_partials(base, i3, i1, h) + 1 + chunk * (2 + DV);
    }

    // Sums are 2 + DV floats: the largest score, the sum of weights relative to it, and the
    // weighted sum of values. Adds those of a later chunk to those of earlier ones.
    void merge(float* all, const float* more) const {
        if (more[1] == 0.0f) {
            return;
        }
        if (all[1] == 0.0f) {
            memcpy(all, more, (2 + DV) * sizeof(float));
            return;
        }
        const float M = std::max(all[0], more[0]), keep = expf(all[0] - M), w = expf(more[0] - M);
        all[0] = M;
        all[1] = all[1] * keep + more[1] * w;
        ggml_vec_scale_f32(DV, all + 2, keep);
        ggml_vec_mad_f32(DV, all + 2, more + 2, w);
    }

    // Adds the sink, divides by the sum of weights, and writes the row.
    void finish(float* all, int64_t i3, int64_t i1, int64_t h) const {
        float scale = all[1] == 0.0f ? 0.0f : 1.0f / all[1];
        if (sinks) {
            const float sink = ((const float*)sinks->data)[h], M = std::max(all[0], sink),
                        keep = expf(all[0] - M);
            scale = keep / (all[1] * keep + expf(sink - M));
        }
        ggml_vec_scale_f32(DV, all + 2, scale);
        memcpy((char*)dst->data + (i3 * n_head * n_q + h + i1 * n_head) * dst->nb[1], all + 2,
               DV * sizeof(float));
    }

    void clear(float* all) const {
        all[0] = -INFINITY;
        std::fill(all + 1, all + 2 + DV, 0.0f);
    }
};

// An item of work: nq query rows from q0 on, of nh heads from h0 on; and the thread's scratch.
struct Tile {
    const Op& op;
    int64_t i3, i_ht, kv_from, kv_to, part, q0, nq, h0, nh;
    const char *keys, *values;
    float* Q;         // [row][DK], scaled queries
    float* P;         // [row][BLOCK], scores, then weights
    float* chunk;     // [row][2 + DV], the sums of a chunk
    float* all;       // [row][2 + DV], the sums of all chunks so far
    float* maskf;     // [BLOCK]
    float* kf;        // [BLOCK][DK], keys as F32, where they are not read in place
    float* vf;        // [BLOCK][DV], values as F32
    uint64_t* group;  // [words], a bit for each cell that any row of a group sees
    uint64_t* common; // [words], that all of them see
    uint64_t* next;   // [words], that the row after the group sees
    int* order;       // [n_cells + ahead + KEYS_AT_ONCE], the cells that a group or row sees

    Tile(const Op& op, int64_t item, float* scratch) : op(op) {
        part = item % op.n_parts;
        item /= op.n_parts;
        const int64_t i_qt = item % op.q_tiles;
        item /= op.q_tiles;
        i_ht = item % op.head_tiles;
        item /= op.head_tiles;
        const int64_t n_kv_items = op.n_kv_head() / op.item_kv_heads;
        kv_from = item % n_kv_items * op.item_kv_heads;
        kv_to = kv_from + op.item_kv_heads;
        i3 = item / n_kv_items;
        q0 = i_qt * op.tile_q;
        nq = std::min(op.tile_q, op.n_q - q0);
        nh = std::min(op.tile_heads, op.group - i_ht * op.tile_heads);

        Q = scratch;
        P = Q + op.n_rows() * op.DK;
        chunk = P + op.n_rows() * BLOCK;
        all = chunk + op.n_rows() * (2 + op.DV);
        maskf = all + op.n_rows() * (2 + op.DV);
        kf = maskf + BLOCK;
        vf = kf + (in_place(op.k->type) ? 0 : BLOCK * op.DK);
        float* end = vf + (in_place(op.v->type) ? 0 : BLOCK * op.DV);
        group = (uint64_t*)GGML_PAD((uintptr_t)end, 64);
        common = group + op.words;
        next = common + op.words;
        order = (int*)(next + op.words);

        select(kv_from);
        if (op.n_parts == 1) {
            for (int64_t row = 0; row < nq * nh; row++) {
                op.clear(all + row * (2 + op.DV));
            }
        }
    }

    // The first of the tile's heads that share a KV head.
    int64_t first_head(int64_t kv_h) const { return kv_h * op.group + i_ht * op.tile_heads; }

    // Goes on with these.
    void select(int64_t kv_h) {
        const int64_t k3 = i3 / op.kv_group3;
        keys = (const char*)op.k->data + kv_h * op.k->nb[2] + k3 * op.k->nb[3];
        values = (const char*)op.v->data + kv_h * op.v->nb[2] + k3 * op.v->nb[3];
        h0 = first_head(kv_h);
        for (int64_t i = 0; i < nq; i++) {
            for (int64_t h = 0; h < nh; h++) {
                float* row = Q + (i * nh + h) * op.DK;
                memcpy(row,
                       (const char*)op.q->data + (q0 + i) * op.q->nb[1] + (h0 + h) * op.q->nb[2] +
                           i3 * op.q->nb[3],
                       op.DK * sizeof(float));
                ggml_vec_scale_f32(op.DK, row, op.scale);
            }
        }
    }

    const ggml_fp16_t* mask(int64_t i) const {
        const ggml_tensor* m = op.mask;
        return m ? (const ggml_fp16_t*)((const char*)m->data + (q0 + i) * m->nb[1] +
                                        (i3 % m->ne[3]) * m->nb[3])
                 : nullptr;
    }

    // All rows, the chunks of this part.
    void attend(float* partials) {
        int n_group = visible(mask(0), op.n_cells, group), n_next = 0;
        for (int first = 0, end; first < nq; first = end) {
            std::copy(group, group + op.words, common);
            // A row joins the group if that costs less than a group of its own. Fetching a cell
            // costs about as much as computing one head of it.
            for (end = first + 1; end < nq; end++) {
                n_next = visible(mask(end), op.n_cells, next);
                int together = 0;
                for (int64_t w = 0; w < op.words; w++) {
                    together += __builtin_popcountll(group[w] | next[w]);
                }
                const int rows = end - first;
                if (together * (1 + nh * (rows + 1)) >
                    n_group * (1 + nh * rows) + n_next * (1 + nh)) {
                    break;
                }
                for (int64_t w = 0; w < op.words; w++) {
                    group[w] |= next[w];
                    common[w] &= next[w];
                }
                n_group = together;
            }
            attend(first, end, partials);
            std::swap(group, next);
            n_group = n_next;
        }
    }

    // Rows first..end: this part's share.
    void attend(int first, int end, float* partials) {
        // Chunks before the first cell that only some of the rows see are equal for all rows.
        int64_t n_common = 0;
        for (int64_t w = 0; w < op.words; w++) {
            const uint64_t some = group[w] & ~common[w];
            n_common += __builtin_popcountll(group[w] & ((some & -some) - 1));
            if (some) {
                break;
            }
        }
        const int64_t n_shared = whole_chunks(n_common);
        attend(first, end, partials, group, chunk_start(n_shared), 0, n_shared);
        for (int i = first; i < end; i++) {
            const uint64_t* seen = group;
            if (end - first > 1) {
                visible(mask(i), op.n_cells, common);
                seen = common;
            }
            int64_t n = 0;
            for (int64_t w = 0; w < op.words; w++) {
                n += __builtin_popcountll(seen[w]);
            }
            attend(i, i + 1, partials, seen, n, n_shared, chunks(n));
            for (int64_t kv_h = kv_from; kv_h < kv_to && op.n_parts > 1 && part == 0; kv_h++) {
                for (int64_t h = 0; h < nh; h++) {
                    *op.n_partials(partials, i3, q0 + i, first_head(kv_h) + h) = chunks(n);
                }
            }
        }
    }

    // Rows first..end, chunks from..to of the first n cells in `seen`: this part's share, which has
    // about as many cells as those of the other parts.
    void attend(int first, int end, float* partials, const uint64_t* seen, int64_t n, int64_t from,
                int64_t to) {
        const auto bound = [&](int64_t i) {
            const int64_t before = chunk_start(from);
            return i == op.n_parts ? to : whole_chunks(before + (n - before) * i / op.n_parts);
        };
        // Of short rows each has its chunks in another part.
        const int64_t share = (part + first) % op.n_parts;
        const int64_t i_first = bound(share), i_end = bound(share + 1);
        if (i_first >= i_end) {
            return;
        }
        const int64_t first_cell = chunk_start(i_first), end_cell = std::min(n, chunk_start(i_end));
        list(seen, first_cell, end_cell);
        for (int64_t i = i_first; i < i_end; i++) {
            const int64_t k = chunk_start(i);
            for (int64_t kv_h = kv_from; kv_h < kv_to; kv_h++) {
                if (kv_to - kv_from > 1) {
                    select(kv_h);
                }
                attend(first, end, partials, i, order + k - first_cell,
                       std::min(chunk_start(i + 1), end_cell) - k);
            }
        }
    }

    // Lists the cells from..to of those in `seen`, and those that follow, or the last one again, to
    // fetch ahead.
    void list(const uint64_t* seen, int64_t from, int64_t to) {
        const int64_t n = to - from + op.ahead + KEYS_AT_ONCE;
        int64_t skip = from, listed = 0;
        for (int64_t w = 0; w < op.words && listed < n; w++) {
            uint64_t rest = seen[w];
            const int count = __builtin_popcountll(rest);
            if (count <= skip) {
                skip -= count;
            } else if (count == 64 && skip == 0) {
                std::iota(order + listed, order + listed + 64, 64 * w);
                listed += 64;
            } else {
                for (; rest; rest &= rest - 1) {
                    if (skip > 0) {
                        skip--;
                    } else {
                        order[listed++] = 64 * w + __builtin_ctzll(rest);
                    }
                }
            }
        }
        if (listed < n) {
            std::fill(order + listed, order + n, order[listed - 1]);
        }
    }

    // Rows first..end, the n cells of a chunk.
    void attend(int first, int end, float* partials, int64_t i_chunk, const int* cell, int n) {
        for (int row = first * nh; row < end * nh; row++) {
            op.clear(chunk + row * (2 + op.DV));
        }
        for (int k = 0; k < n; k += BLOCK) {
            block(first, end, cell + k, std::min(BLOCK, n - k));
        }
        for (int row = first * nh; row < end * nh; row++) {
            const float* sums = chunk + row * (2 + op.DV);
            if (op.n_parts > 1) {
                float* partial = op.partial(partials, i3, q0 + row / nh, h0 + row % nh, i_chunk);
                memcpy(partial, sums, (2 + op.DV) * sizeof(float));
            } else {
                op.merge(all + row * (2 + op.DV), sums);
            }
        }
    }

    // score[r][k] of all rows from `first` on.
    template <typename T>
    void scores_of(int first, int n_rows, const Rows<T>& keys) {
        float* score[TILE_ROWS];
        const float* query[TILE_ROWS];
        for (int r = 0; r < n_rows; r++) {
            score[r] = P + (first * nh + r) * BLOCK;
            query[r] = Q + (first * nh + r) * op.DK;
        }
        in_registers(n_rows, [&](auto NR, int r) {
            r == 0 && keys.ahead > 0 ? scores<NR, true>(score + r, query + r, keys)
                   : scores<NR, false>(score + r, query + r, keys);
        });
    }

    // Adds the weighted values to the sums of all rows from `first` on.
    template <typename T>
    void add_values_of(int first, int n_rows, const Rows<T>& values) {
        float* weight[TILE_ROWS];
        float* out[TILE_ROWS];
        for (int r = 0; r < n_rows; r++) {
            weight[r] = P + (first * nh + r) * BLOCK;
            out[r] = chunk + (first * nh + r) * (2 + op.DV) + 2;
        }
        in_registers(n_rows, [&](auto NR, int r) {
            r == 0 && values.ahead > 0 ? add_values<NR, true>(out + r, weight + r, values)
                   : add_values<NR, false>(out + r, weight + r, values);
        });
    }

    // Calls `each` with the rows of n cells: in place, or converted to `converted`.
    template <typename Each>
    void with_rows(const ggml_tensor* t, const char* data, const int* cell, int n, float* converted,
                   const Each& each) {
        const int64_t d = t->ne[0];
        if (t->type == GGML_TYPE_F16) {
            each(Rows<ggml_fp16_t>{data, t->nb[1], d, cell, n, (int)op.ahead});
        } else if (t->type == GGML_TYPE_F32) {
            each(Rows<float>{data, t->nb[1], d, cell, n, (int)op.ahead});
        } else {
            int in_order[BLOCK];
            std::iota(in_order, in_order + BLOCK, 0);
            to_float(t, data, cell, n, op.ahead, converted);
            each(Rows<float>{(const char*)converted, d * sizeof(float), d, in_order, n, 0});
        }
    }

    // Rows first..end, n cells.
    void block(int first, int end, const int* cell, int n) {
        const int n_rows = (end - first) * nh;
        with_rows(op.k, keys, cell, n, kf,
                  [&](const auto& rows) { scores_of(first, n_rows, rows); });

        const bool adjacent = cell[n - 1] - cell[0] == n - 1;
        for (int i = first; i < end; i++) {
            if (op.mask && adjacent) {
                ggml_cpu_fp16_to_fp32(mask(i) + cell[0], maskf, n);
            } else if (op.mask) {
                for (int k = 0; k < n; k++) {
                    maskf[k] = GGML_CPU_FP16_TO_FP32(mask(i)[cell[k]]);
                }
            }
            for (int h = 0; h < nh; h++) {
                softmax(i * nh + h, h0 + h, n);
            }
        }

        with_rows(op.v, values, cell, n, vf,
                  [&](const auto& rows) { add_values_of(first, n_rows, rows); });
    }

    // Turns a row's scores into weights, relative to the largest score so far.
    void softmax(int row, int64_t head, int n) {
        float* p = P + row * BLOCK;
        // Whole vectors: the remainder of ggml_vec_soft_max_f32 rounds in another way, and a cell's
        // weight must not depend on how many cells are beside it.
        const int n_padded = GGML_PAD(n, LANES);
        std::fill(p + n, p + n_padded, -INFINITY);
        if (op.softcap != 0.0f) {
            for (int k = 0; k < n; k++) {
                p[k] = op.softcap * tanhf(p[k]);
            }
        }
        if (op.mask) {
            ggml_vec_mad_f32(n, p, maskf, op.slope(head));
        }
        float *sums = chunk + row * (2 + op.DV), &M = sums[0], &S = sums[1];
        const float m = std::max(M, max_of(p, n_padded));
        if (m == -INFINITY) {
            memset(p, 0, n * sizeof(float));
            return;
        }
        const float keep = M == m ? 1.0f : expf(M - m);
        S = S * keep + (float)ggml_vec_soft_max_f32(n_padded, p, p, m);
        M = m;
        if (keep != 1.0f) {
            ggml_vec_scale_f32(op.DV, sums + 2, keep);
        }
    }
};

void compute(const Op& op, int64_t item, float* scratch, float* partials) {
    Tile tile(op, item, scratch);
    tile.attend(partials);
    for (int64_t row = 0; row < tile.nq * tile.nh && op.n_parts == 1; row++) {
        op.finish(tile.all + row * (2 + op.DV), tile.i3, tile.q0 + row / tile.nh,
                  tile.h0 + row % tile.nh);
    }
}

// Describes an operation for the kernel. Returns false for types and shapes that it does not
// support, and where `room`, in floats, is too small; parts need more of it than whole tiles.
bool describe(const ggml_tensor* dst, int n_threads, size_t room, Op* result) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];
    const auto readable = [](ggml_type type) {
        return in_place(type) || ggml_get_type_traits(type)->to_float != nullptr;
    };
    const bool types = q->type == GGML_TYPE_F32 && readable(k->type) && readable(v->type);
    const bool shapes = k->ne[0] % EPR == 0 && v->ne[0] % EPR == 0 && k->ne[2] == v->ne[2] &&
                        k->ne[3] == v->ne[3] && (!mask || mask->ne[2] == 1);
    if (!types || !shapes) {
        return false;
    }

    Op op;
    op.q = q;
    op.k = k;
    op.v = v;
    op.mask = mask;
    op.sinks = dst->src[4];
    op.dst = dst;
    op.DK = k->ne[0];
    op.DV = v->ne[0];
    op.n_q = q->ne[1];
    op.n_cells = k->ne[1];
    op.n_head = q->ne[2];
    op.n_streams = q->ne[3];
    op.group = q->ne[2] / k->ne[2];
    op.kv_group3 = q->ne[3] / k->ne[3];

    memcpy(&op.scale, (const float*)dst->op_params + 0, sizeof(float));
    memcpy(&op.max_bias, (const float*)dst->op_params + 1, sizeof(float));
    memcpy(&op.softcap, (const float*)dst->op_params + 2, sizeof(float));
    if (op.softcap != 0.0f) {
        op.scale /= op.softcap;
    }
    op.n_head_log2 = 1u << (uint32_t)floor(log2(op.n_head));
    op.m0 = powf(2.0f, -(op.max_bias) / op.n_head_log2);
    op.m1 = powf(2.0f, -(op.max_bias / 2.0f) / op.n_head_log2);

    op.tile_heads = std::min<int64_t>(op.group, TILE_ROWS);
    op.tile_q = std::min<int64_t>(op.n_q, TILE_ROWS / op.tile_heads);
    op.head_tiles = (op.group + op.tile_heads - 1) / op.tile_heads;
    op.q_tiles = (op.n_q + op.tile_q - 1) / op.tile_q;
    op.n_parts = op.item_kv_heads = 1;
    op.max_chunks = chunks(op.n_cells);
    op.words = (op.n_cells + 63) / 64;
    const int64_t n_bytes = ggml_row_size(k->type, op.DK) + ggml_row_size(v->type, op.DV);
    op.ahead = std::clamp<int64_t>(AHEAD_BYTES / (op.n_kv_head() * n_bytes), 16, 256);
    if (n_threads * op.scratch() > room) {
        return false;
    }
    if (op.n_items() < 4 * n_threads) {
        Op split = op;
        split.n_parts = std::min<int64_t>(2 * n_threads, op.max_chunks);
        split.item_kv_heads = op.max_chunks < 4 * split.n_parts ? 1 : op.n_kv_head();
        if (n_threads * split.scratch() + split.partials() <= room) {
            op = split;
        }
    }
    *result = op;
    return true;
}

} // namespace

size_t ggml_attention_work_size(const ggml_tensor* dst, int n_threads) {
    Op op;
    return describe(dst, n_threads, SIZE_MAX, &op)
               ? (n_threads * op.scratch() + op.partials()) * sizeof(float)
               : 0;
}

bool ggml_attention_by_kv_head(const ggml_compute_params* params, ggml_tensor* dst) {
    const int ith = params->ith, nth = params->nth;
    Op op;
    if (params->use_ref || !describe(dst, nth, params->wsize / sizeof(float), &op)) {
        return false;
    }
    float* scratch = (float*)params->wdata + ith * op.scratch();
    float* partials = (float*)params->wdata + nth * op.scratch();

    if (ith == 0) {
        ggml_threadpool_chunk_set(params->threadpool, nth);
    }
    ggml_barrier(params->threadpool);
    const bool numa = ggml_is_numa();
    for (int64_t item = ith; item < op.n_items();
         item = numa ? item + nth : ggml_threadpool_chunk_add(params->threadpool, 1)) {
        compute(op, item, scratch, partials);
    }
    if (op.n_parts > 1) {
        ggml_barrier(params->threadpool);
        for (int64_t row = ith; row < op.n_streams * op.n_q * op.n_head; row += nth) {
            const int64_t h = row % op.n_head, i1 = row / op.n_head % op.n_q,
                          i3 = row / op.n_head / op.n_q;
            float* all = op.partial(partials, i3, i1, h, 0);
            const int64_t n_chunks = *op.n_partials(partials, i3, i1, h);
            if (n_chunks == 0) {
                op.clear(all);
            }
            for (int64_t i = 1; i < n_chunks; i++) {
                op.merge(all, op.partial(partials, i3, i1, h, i));
            }
            op.finish(all, i3, i1, h);
        }
    }
    return true;
}

#else

size_t ggml_attention_work_size(const ggml_tensor*, int) { return 0; }
bool ggml_attention_by_kv_head(const ggml_compute_params*, ggml_tensor*) { return false; }

#endif
