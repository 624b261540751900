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
// The work is divided into items: (stream, KV head, tile of query rows). The cells that a row sees,
// in their order, are divided into chunks; the sums over each chunk are merged in that order, as in
// https://arxiv.org/pdf/2112.05682. Adjacent rows of a tile that see about the same cells form a
// group: chunks that are equal for all of them are computed together, the others row by row. Where
// there are fewer than four tiles for a thread, the threads divide a tile's chunks among them.
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

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)) ||        \
    (defined(__ARM_NEON) && defined(__aarch64__) && !defined(__ARM_FEATURE_SVE))

namespace {

constexpr int BLOCK = 64;      // cells whose scores are kept at a time
constexpr int CHUNK = 128;     // cells of one set of sums
constexpr int TILE_ROWS = 24;  // query rows x heads of a tile
constexpr int LANES = 16;      // the most F32 values of a vector
constexpr int CACHE_LINE = 16; // F32 values
constexpr int EPR = GGML_F32_EPR;

static_assert(CHUNK % BLOCK == 0 && BLOCK % LANES == 0, "whole blocks and vectors");

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

// Keys or values of one KV head, of the cells listed.
template <typename T>
struct Rows {
    const char* data;
    size_t stride;
    const int* cell;

    const T* at(int k) const { return (const T*)(data + cell[k] * stride); }
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

// Fetches the head's bytes of n cells ahead: they are too far apart for the processor to predict.
inline void prefetch(const char* data, size_t stride, const int* cell, int n, size_t n_bytes) {
    for (int k = 0; k < n; k++) {
        for (size_t i = 0; i < n_bytes; i += 64) {
            __builtin_prefetch(data + cell[k] * stride + i);
        }
    }
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
inline void to_float(const ggml_tensor* t, const char* data, const int* cell, int n, float* out) {
    const int64_t d = t->ne[0];
    const auto any = ggml_get_type_traits(t->type)->to_float;
    for (int k = 0; k < n; k++) {
        const char* x = data + cell[k] * t->nb[1];
        if (t->type == GGML_TYPE_Q8_0) {
            to_float((const block_q8_0*)x, out + k * d, d);
        } else {
            any(x, out + k * d, d);
        }
    }
}

// Types that are read where they are.
inline bool in_place(ggml_type type) { return type == GGML_TYPE_F16 || type == GGML_TYPE_F32; }

// score[r][k] = q[r] . keys[k] for NR rows and n keys. Writes a multiple of four scores a row.
template <int NR, typename T>
void scores(float* const* score, const float* const* q, Rows<T> keys, int n, int64_t DK) {
    for (int k = 0; k < n; k += 4) {
        const T* key[4];
        for (int j = 0; j < 4; j++) {
            key[j] = keys.at(std::min(k + j, n - 1));
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

// out[r] += sum over n cells of weight[r][k] * value[k]: NV vectors of it, from d on.
template <int NR, int NV, typename T>
void add_vectors(float* const* out, const float* const* weight, Rows<T> values, int64_t d, int n) {
    GGML_F32_VEC acc[NR][NV];
    for (int r = 0; r < NR; r++) {
        for (int j = 0; j < NV; j++) {
            acc[r][j] = GGML_F32_VEC_LOAD(out[r] + d + j * EPR);
        }
    }
    for (int k = 0; k < n; k++) {
        GGML_F32_VEC v[NV];
        for (int j = 0; j < NV; j++) {
            v[j] = load(values.at(k) + d + j * EPR);
        }
        for (int r = 0; r < NR; r++) {
            const GGML_F32_VEC w = GGML_F32_VEC_SET1(weight[r][k]);
            for (int j = 0; j < NV; j++) {
                acc[r][j] = GGML_F32_VEC_FMA(acc[r][j], v[j], w);
            }
        }
    }
    for (int r = 0; r < NR; r++) {
        for (int j = 0; j < NV; j++) {
            GGML_F32_VEC_STORE(out[r] + d + j * EPR, acc[r][j]);
        }
    }
}

template <int NR, typename T>
void add_values(float* const* out, const float* const* weight, Rows<T> values, int n, int64_t DV) {
    int64_t d = 0;
    for (; d + 4 * EPR <= DV; d += 4 * EPR) {
        add_vectors<NR, 4>(out, weight, values, d, n);
    }
    for (; d < DV; d += EPR) {
        add_vectors<NR, 1>(out, weight, values, d, n);
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

// The largest of n values, a multiple of LANES.
inline float max_of(const float* x, int n) {
    float lane[LANES];
    std::fill(lane, lane + LANES, -INFINITY);
    for (int k = 0; k < n; k += LANES) {
        for (int j = 0; j < LANES; j++) {
            lane[j] = x[k + j] > lane[j] ? x[k + j] : lane[j];
        }
    }
    return *std::max_element(lane, lane + LANES);
}

// The operation: tensors, shapes, parameters, and how the work is divided.
struct Op {
    const ggml_tensor *q, *k, *v, *mask, *sinks;
    ggml_tensor* dst;
    int64_t DK, DV, n_q, n_cells, n_head, n_streams, group, kv_group3;
    int64_t tile_heads, tile_q, head_tiles, q_tiles, n_parts, max_chunks, words;
    float scale, max_bias, softcap, m0, m1;
    uint32_t n_head_log2;

    float slope(int64_t h) const {
        if (max_bias <= 0.0f) {
            return 1.0f;
        }
        return h < n_head_log2 ? powf(m0, h + 1) : powf(m1, 2 * (h - n_head_log2) + 1);
    }

    int64_t n_rows() const { return tile_q * tile_heads; }
    int64_t n_items() const {
        return n_streams * (n_head / group) * head_tiles * q_tiles * n_parts;
    }
    // Floats of a thread's scratch memory: see Tile.
    size_t scratch() const {
        const int64_t converted = (in_place(k->type) ? 0 : DK) + (in_place(v->type) ? 0 : DV);
        return n_rows() * (DK + BLOCK + 2 * (DV + 2)) + BLOCK * (1 + converted) + 6 * words +
               2 * CACHE_LINE;
    }
    // Floats of the sums of all chunks, where threads divide them.
    size_t partials() const {
        return n_parts > 1 ? n_streams * n_q * n_head * max_chunks * (2 + DV) : 0;
    }

    // The sums of a query row, head and chunk.
    float* partial(float* base, int64_t i3, int64_t i1, int64_t h, int64_t chunk) const {
        return base + (((i3 * n_q + i1) * n_head + h) * max_chunks + chunk) * (2 + DV);
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
    int64_t i3, kv_h, q0, nq, h0, nh;
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

    Tile(const Op& op, int64_t item, float* scratch) : op(op) {
        const int64_t i_qt = item % op.q_tiles;
        item /= op.q_tiles;
        const int64_t i_ht = item % op.head_tiles;
        item /= op.head_tiles;
        kv_h = item % (op.n_head / op.group);
        i3 = item / (op.n_head / op.group);
        q0 = i_qt * op.tile_q;
        nq = std::min(op.tile_q, op.n_q - q0);
        h0 = kv_h * op.group + i_ht * op.tile_heads;
        nh = std::min(op.tile_heads, (kv_h + 1) * op.group - h0);

        const int64_t k3 = i3 / op.kv_group3;
        keys = (const char*)op.k->data + kv_h * op.k->nb[2] + k3 * op.k->nb[3];
        values = (const char*)op.v->data + kv_h * op.v->nb[2] + k3 * op.v->nb[3];

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
        for (int64_t row = 0; row < nq * nh; row++) {
            op.clear(all + row * (2 + op.DV));
        }
    }

    const ggml_fp16_t* mask(int64_t i) const {
        const ggml_tensor* m = op.mask;
        return m ? (const ggml_fp16_t*)((const char*)m->data + (q0 + i) * m->nb[1] +
                                        (i3 % m->ne[3]) * m->nb[3])
                 : nullptr;
    }

    // All rows, the chunks of this part.
    void attend(int64_t part, float* partials) {
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
            attend(first, end, part, partials);
            std::swap(group, next);
            n_group = n_next;
        }
    }

    // Rows first..end, the chunks of this part.
    void attend(int first, int end, int64_t part, float* partials) {
        // Chunks before the first cell that only some of the rows see are equal for all rows.
        int64_t n_common = 0;
        for (int64_t w = 0; w < op.words; w++) {
            const uint64_t some = group[w] & ~common[w];
            n_common += __builtin_popcountll(group[w] & ((some & -some) - 1));
            if (some) {
                break;
            }
        }
        const int64_t n_shared = n_common / CHUNK;
        attend(first, end, part, partials, group, 0, n_shared);
        for (int i = first; i < end; i++) {
            const uint64_t* seen = group;
            if (end - first > 1) {
                visible(mask(i), op.n_cells, common);
                seen = common;
            }
            attend(i, i + 1, part, partials, seen, n_shared, op.max_chunks);
        }
    }

    // Rows first..end, chunks from..to of the cells in `seen`.
    void attend(int first, int end, int64_t part, float* partials, const uint64_t* seen,
                int64_t from, int64_t to) {
        int cell[CHUNK], n = 0;
        int64_t skip = from * CHUNK, i_chunk = from;
        for (int64_t w = 0; w < op.words && i_chunk < to; w++) {
            const int count = __builtin_popcountll(seen[w]);
            if (count <= skip) {
                skip -= count;
                continue;
            }
            for (uint64_t rest = seen[w]; rest && i_chunk < to; rest &= rest - 1) {
                if (skip > 0) {
                    skip--;
                    continue;
                }
                cell[n++] = 64 * w + __builtin_ctzll(rest);
                if (n == CHUNK) {
                    attend(first, end, part, partials, i_chunk++, cell, n);
                    n = 0;
                }
            }
        }
        // Where partial sums are kept, those of empty chunks are written too.
        for (; i_chunk < to && (n > 0 || op.n_parts > 1); i_chunk++, n = 0) {
            attend(first, end, part, partials, i_chunk, cell, n);
        }
    }

    void attend(int first, int end, int64_t part, float* partials, int64_t i_chunk, const int* cell,
                int n) {
        if (i_chunk % op.n_parts != part) {
            return;
        }
        for (int row = first * nh; row < end * nh; row++) {
            op.clear(chunk + row * (2 + op.DV));
        }
        for (int k = 0; k < n; k += BLOCK) {
            block(first, end, cell + k, std::min(BLOCK, n - k),
                  std::max(0, std::min(BLOCK, n - k - BLOCK)));
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

    // score[r][k] of all rows from `first` on, n cells.
    template <typename T>
    void scores_of(int first, int n_rows, Rows<T> keys, int n) {
        float* score[TILE_ROWS];
        const float* query[TILE_ROWS];
        for (int r = 0; r < n_rows; r++) {
            score[r] = P + (first * nh + r) * BLOCK;
            query[r] = Q + (first * nh + r) * op.DK;
        }
        for (int r = 0; r < n_rows;) {
            switch (std::min(3, n_rows - r)) {
                case 3:
                    scores<3>(score + r, query + r, keys, n, op.DK);
                    r += 3;
                    break;
                case 2:
                    scores<2>(score + r, query + r, keys, n, op.DK);
                    r += 2;
                    break;
                default:
                    scores<1>(score + r, query + r, keys, n, op.DK);
                    r += 1;
                    break;
            }
        }
    }

    // Adds the weighted values of n cells to the sums of all rows from `first` on.
    template <typename T>
    void add_values_of(int first, int n_rows, Rows<T> values, int n) {
        float* weight[TILE_ROWS];
        float* out[TILE_ROWS];
        for (int r = 0; r < n_rows; r++) {
            weight[r] = P + (first * nh + r) * BLOCK;
            out[r] = chunk + (first * nh + r) * (2 + op.DV) + 2;
        }
        for (int r = 0; r < n_rows;) {
            switch (std::min(3, n_rows - r)) {
                case 3:
                    add_values<3>(out + r, weight + r, values, n, op.DV);
                    r += 3;
                    break;
                case 2:
                    add_values<2>(out + r, weight + r, values, n, op.DV);
                    r += 2;
                    break;
                default:
                    add_values<1>(out + r, weight + r, values, n, op.DV);
                    r += 1;
                    break;
            }
        }
    }

    // Calls `each` with the rows of n cells: in place, or converted to `converted`.
    template <typename Each>
    void with_rows(const ggml_tensor* t, const char* data, const int* cell, int n, float* converted,
                   const Each& each) {
        if (t->type == GGML_TYPE_F16) {
            each(Rows<ggml_fp16_t>{data, t->nb[1], cell});
        } else if (t->type == GGML_TYPE_F32) {
            each(Rows<float>{data, t->nb[1], cell});
        } else {
            int in_order[BLOCK];
            for (int k = 0; k < n; k++) {
                in_order[k] = k;
            }
            to_float(t, data, cell, n, converted);
            each(Rows<float>{(const char*)converted, t->ne[0] * sizeof(float), in_order});
        }
    }

    // Rows first..end, n cells; the n_after cells after them are fetched ahead.
    void block(int first, int end, const int* cell, int n, int n_after) {
        const int n_rows = (end - first) * nh;
        const size_t k_bytes = ggml_row_size(op.k->type, op.DK),
                     v_bytes = ggml_row_size(op.v->type, op.DV);

        prefetch(values, op.v->nb[1], cell, n, v_bytes);
        with_rows(op.k, keys, cell, n, kf,
                  [&](auto rows) { scores_of(first, n_rows, rows, n); });

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

        prefetch(keys, op.k->nb[1], cell + n, n_after, k_bytes);
        with_rows(op.v, values, cell, n, vf,
                  [&](auto rows) { add_values_of(first, n_rows, rows, n); });
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
        const float keep = expf(M - m);
        S = S * keep + (float)ggml_vec_soft_max_f32(n_padded, p, p, m);
        M = m;
        if (keep != 1.0f) {
            ggml_vec_scale_f32(op.DV, sums + 2, keep);
        }
    }
};

void compute(const Op& op, int64_t item, float* scratch, float* partials) {
    const int64_t part = item % op.n_parts;
    Tile tile(op, item / op.n_parts, scratch);
    tile.attend(part, partials);
    for (int64_t row = 0; row < tile.nq * tile.nh && op.n_parts == 1; row++) {
        op.finish(tile.all + row * (2 + op.DV), tile.i3, tile.q0 + row / tile.nh,
                  tile.h0 + row % tile.nh);
    }
}

} // namespace

bool ggml_attention_by_kv_head(const ggml_compute_params* params, ggml_tensor* dst) {
    const ggml_tensor *q = dst->src[0], *k = dst->src[1], *v = dst->src[2], *mask = dst->src[3];

    const auto readable = [](ggml_type type) {
        return in_place(type) || ggml_get_type_traits(type)->to_float != nullptr;
    };
    const bool types = q->type == GGML_TYPE_F32 && readable(k->type) && readable(v->type);
    const bool shapes = k->ne[0] % EPR == 0 && v->ne[0] % EPR == 0 && k->ne[2] == v->ne[2] &&
                        k->ne[3] == v->ne[3] && (!mask || mask->ne[2] == 1);
    if (params->use_ref || !types || !shapes) {
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

    const int ith = params->ith, nth = params->nth;
    op.tile_heads = std::min<int64_t>(op.group, TILE_ROWS);
    op.tile_q = std::min<int64_t>(op.n_q, TILE_ROWS / op.tile_heads);
    op.head_tiles = (op.group + op.tile_heads - 1) / op.tile_heads;
    op.q_tiles = (op.n_q + op.tile_q - 1) / op.tile_q;
    op.n_parts = 1;
    op.max_chunks = (op.n_cells + CHUNK - 1) / CHUNK;
    op.words = (op.n_cells + 63) / 64;
    const size_t room = params->wsize / sizeof(float);
    if (nth * op.scratch() > room) {
        return false;
    }
    if (op.n_items() < 4 * nth) {
        Op split = op;
        split.n_parts = std::min<int64_t>(nth, op.max_chunks);
        if (nth * split.scratch() + split.partials() <= room) {
            op = split;
        }
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
            for (int64_t i = 1; i < op.max_chunks; i++) {
                op.merge(all, op.partial(partials, i3, i1, h, i));
            }
            op.finish(all, i3, i1, h);
        }
    }
    return true;
}

#else

bool ggml_attention_by_kv_head(const ggml_compute_params*, ggml_tensor*) { return false; }

#endif
