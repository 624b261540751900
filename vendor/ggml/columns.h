// How weights are stored for the kernels of few-rows.cpp: the blocks of eight columns are
// interleaved, four values of each column in turn, so that a 32-bit lane of a vector holds four
// values of its column. A block has one group of 32 values, or eight. A layout takes as many bytes
// as the eight blocks of the file.
#pragma once

#include "ggml-impl.h"
#include "quants.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int COLS = 8;

// What a layout has unless it says otherwise.
struct Layout {
    static constexpr int GROUPS = 1;           // groups of 32 values in a block
    static constexpr int PARTS = 1;            // parts of a group with a scale of their own
    static constexpr int LOW_BITS = 4;         // bits of a value in qs
    static constexpr int HIGH_BITS = 0;        // bits of a value in qh
    static constexpr bool IS_INDEX = false;    // values are places in the table of the IQ4 types
    static constexpr bool HAS_MINIMUM = false; // a group's values have something added to them
    static constexpr int OFFSET = 0;           // what values have added to be stored from 0 on
};

// qs: values 0..15 in the lower halves of bytes, 16..31 in the upper ones.
struct columns_q4_0 : Layout {
    using Block = block_q4_0;
    static constexpr int MOST = 15, OFFSET = 8;
    ggml_half d[COLS];
    uint8_t qs[1][128];
};

struct columns_q4_1 : Layout {
    using Block = block_q4_1;
    static constexpr int MOST = 15;
    static constexpr bool HAS_MINIMUM = true;
    ggml_half d[COLS], m[COLS];
    uint8_t qs[1][128];
};

// Bit i of a byte of qh belongs to the i-th four values of its column.
struct columns_q5_0 : Layout {
    using Block = block_q5_0;
    static constexpr int MOST = 31, OFFSET = 16, HIGH_BITS = 1;
    ggml_half d[COLS];
    uint8_t qs[1][128];
    uint8_t qh[1][32];
};

struct columns_q5_1 : Layout {
    using Block = block_q5_1;
    static constexpr int MOST = 31, HIGH_BITS = 1;
    static constexpr bool HAS_MINIMUM = true;
    ggml_half d[COLS], m[COLS];
    uint8_t qs[1][128];
    uint8_t qh[1][32];
};

// Signed; with VNNI the values are taken as unsigned ones, 128 more.
struct columns_q8_0 : Layout {
    using Block = block_q8_0;
    static constexpr int MOST = 255, OFFSET = 128, LOW_BITS = 8;
    ggml_half d[COLS];
    int8_t qs[1][256];
};

// As in columns_q4_0; with VNNI the table's values are taken as unsigned ones, 128 more.
struct columns_iq4_nl : Layout {
    using Block = block_iq4_nl;
    static constexpr int MOST = 255, OFFSET = 128;
    static constexpr bool IS_INDEX = true;
    ggml_half d[COLS];
    uint8_t qs[1][128];
};

struct LayoutK : Layout {
    static constexpr int GROUPS = QK_K / 32;
};

// The scales of two groups (0..63, of eight columns), as two nibbles of a byte (scale, minimum) and
// above them two bits each.
struct pair_of_scales {
    uint8_t low[2][COLS];
    uint8_t high[COLS]; // two bits each: scale and minimum of the first group, of the second
};

// m is subtracted.
struct columns_q4_K : LayoutK {
    using Block = block_q4_K;
    static constexpr int MOST = 15;
    static constexpr bool HAS_MINIMUM = true;
    ggml_half d[COLS], m[COLS];
    pair_of_scales scales[GROUPS / 2];
    uint8_t qs[GROUPS][128];
};

struct columns_q5_K : LayoutK {
    using Block = block_q5_K;
    static constexpr int MOST = 31, HIGH_BITS = 1;
    static constexpr bool HAS_MINIMUM = true;
    ggml_half d[COLS], m[COLS];
    pair_of_scales scales[GROUPS / 2];
    uint8_t qs[GROUPS][128];
    uint8_t qh[GROUPS][32];
};

// A byte of qh has two bits for each four values: of 0..15, then 16..31.
struct columns_q6_K : LayoutK {
    using Block = block_q6_K;
    static constexpr int MOST = 63, OFFSET = 32, PARTS = 2, HIGH_BITS = 2;
    ggml_half d[COLS];
    int8_t scales[GROUPS][PARTS][COLS];
    uint8_t qs[GROUPS][128];
    uint8_t qh[GROUPS][2][32];
};

// Scales and minima in nibbles of a byte; m is subtracted. A byte of qs has two bits each of four
// times four values, of 0..15, then of 16..31.
struct columns_q2_K : LayoutK {
    using Block = block_q2_K;
    static constexpr int MOST = 3, PARTS = 2, LOW_BITS = 2;
    static constexpr bool HAS_MINIMUM = true;
    ggml_half d[COLS], m[COLS];
    uint8_t scales[GROUPS][PARTS][COLS];
    uint8_t qs[GROUPS][64];
};

// Scales are 32 more than they are, in nibbles of a byte (the two parts) and two bits each of
// another (the parts of two groups).
struct columns_q3_K : LayoutK {
    using Block = block_q3_K;
    static constexpr int MOST = 7, OFFSET = 4, PARTS = 2, LOW_BITS = 2, HIGH_BITS = 1;
    ggml_half d[COLS];
    uint8_t scales[GROUPS][COLS];
    uint8_t scales_high[GROUPS / 2][COLS];
    uint8_t qs[GROUPS][64];
    uint8_t qh[GROUPS][32];
};

// Scales are 32 more than they are, in nibbles of a byte (two groups) and two bits each of another
// (four groups).
struct columns_iq4_xs : LayoutK {
    using Block = block_iq4_xs;
    static constexpr int MOST = 255, OFFSET = 128;
    static constexpr bool IS_INDEX = true;
    ggml_half d[COLS];
    uint8_t scales[GROUPS / 2][COLS];
    uint8_t scales_high[GROUPS / 4][COLS];
    uint8_t qs[GROUPS][128];
};

// Words of four bytes, at any address.
inline uint32_t word(const void* p, int i) {
    uint32_t w;
    memcpy(&w, (const char*)p + 4 * i, sizeof(w));
    return w;
}

inline void set_word(void* p, int i, uint32_t w) { memcpy((char*)p + 4 * i, &w, sizeof(w)); }

constexpr uint32_t LOW_NIBBLES = 0x0F0F0F0F;

inline void take_scales(columns_q4_0& out, int c, const block_q4_0& in) { out.d[c] = in.d; }
inline void take_scales(columns_q5_0& out, int c, const block_q5_0& in) { out.d[c] = in.d; }
inline void take_scales(columns_q8_0& out, int c, const block_q8_0& in) { out.d[c] = in.d; }
inline void take_scales(columns_iq4_nl& out, int c, const block_iq4_nl& in) { out.d[c] = in.d; }

inline void take_scales(columns_q4_1& out, int c, const block_q4_1& in) {
    out.d[c] = in.d;
    out.m[c] = in.m;
}

inline void take_scales(columns_q5_1& out, int c, const block_q5_1& in) {
    out.d[c] = in.d;
    out.m[c] = in.m;
}

// Twelve bytes of the file have eight scales and eight minima of six bits.
template <typename Columns>
inline void take_scales_K(Columns& out, int c, const typename Columns::Block& in) {
    const uint8_t* p = in.scales;
    out.d[c] = in.d;
    out.m[c] = in.dmin;
    uint8_t scales[8], minima[8];
    for (int g = 0; g < 4; g++) {
        scales[g] = p[g] & 63;
        minima[g] = p[g + 4] & 63;
        scales[g + 4] = (p[g + 8] & 15) | (p[g] >> 6 << 4);
        minima[g + 4] = (p[g + 8] >> 4) | (p[g + 4] >> 6 << 4);
    }
    for (int i = 0; i < 4; i++) {
        const int g = 2 * i;
        pair_of_scales& pair = out.scales[i];
        pair.low[0][c] = (scales[g] & 15) | minima[g] << 4;
        pair.low[1][c] = (scales[g + 1] & 15) | minima[g + 1] << 4;
        pair.high[c] = (scales[g] >> 4) | (minima[g] >> 4) << 2 | (scales[g + 1] >> 4) << 4 |
                       (minima[g + 1] >> 4) << 6;
    }
}

inline void take_scales(columns_q4_K& out, int c, const block_q4_K& in) {
    take_scales_K(out, c, in);
}
inline void take_scales(columns_q5_K& out, int c, const block_q5_K& in) {
    take_scales_K(out, c, in);
}

inline void take_scales(columns_q6_K& out, int c, const block_q6_K& in) {
    out.d[c] = in.d;
    for (int i = 0; i < 16; i++) {
        out.scales[i / 2][i % 2][c] = in.scales[i];
    }
}

inline void take_scales(columns_q2_K& out, int c, const block_q2_K& in) {
    out.d[c] = in.d;
    out.m[c] = in.dmin;
    for (int i = 0; i < 16; i++) {
        out.scales[i / 2][i % 2][c] = in.scales[i];
    }
}

// Byte i of the file's first eight has the lower halves of scales i and i + 8; byte 8 + i % 4 has
// the upper bits of scales i, i + 4, i + 8 and i + 12.
inline void take_scales(columns_q3_K& out, int c, const block_q3_K& in) {
    out.d[c] = in.d;
    const auto low = [&](int i) { return in.scales[i % 8] >> i / 8 * 4 & 15; };
    const auto high = [&](int i) { return in.scales[8 + i % 4] >> i / 4 * 2 & 3; };
    for (int g = 0; g < 8; g++) {
        out.scales[g][c] = low(2 * g) | low(2 * g + 1) << 4;
    }
    for (int g = 0; g < 4; g++) {
        out.scales_high[g][c] =
            high(4 * g) | high(4 * g + 1) << 2 | high(4 * g + 2) << 4 | high(4 * g + 3) << 6;
    }
}

inline void take_scales(columns_iq4_xs& out, int c, const block_iq4_xs& in) {
    out.d[c] = in.d;
    for (int i = 0; i < 4; i++) {
        out.scales[i][c] = in.scales_l[i];
    }
    for (int i = 0; i < 2; i++) {
        out.scales_high[i][c] = in.scales_h >> 8 * i;
    }
}

// Values of 4 bits as the file has them in groups of 32.
template <typename Columns>
inline void take_nibbles(Columns& out, int c, const uint8_t* qs) {
    for (int g = 0; g < Columns::GROUPS; g++) {
        for (int i = 0; i < 4; i++) {
            set_word(out.qs[g], COLS * i + c, word(qs + 16 * g, i));
        }
    }
}

// The fifth bits of 32 values.
template <typename Columns>
inline void take_fifth_bits(Columns& out, int c, uint32_t bits) {
    uint32_t w = 0;
    for (int i = 0; i < 8; i++) {
        const uint32_t four = bits >> 4 * i & 15;
        w |= (four * 0x00204081 & 0x01010101) << i; // a bit to each byte
    }
    set_word(out.qh[0], c, w);
}

inline void take_values(columns_q4_0& out, int c, const block_q4_0& in) {
    take_nibbles(out, c, in.qs);
}
inline void take_values(columns_q4_1& out, int c, const block_q4_1& in) {
    take_nibbles(out, c, in.qs);
}

inline void take_values(columns_iq4_nl& out, int c, const block_iq4_nl& in) {
    take_nibbles(out, c, in.qs);
}

inline void take_values(columns_q5_0& out, int c, const block_q5_0& in) {
    take_nibbles(out, c, in.qs);
    take_fifth_bits(out, c, word(in.qh, 0));
}

inline void take_values(columns_q5_1& out, int c, const block_q5_1& in) {
    take_nibbles(out, c, in.qs);
    take_fifth_bits(out, c, word(in.qh, 0));
}

inline void take_values(columns_q8_0& out, int c, const block_q8_0& in) {
    for (int i = 0; i < 8; i++) {
        set_word(out.qs[0], COLS * i + c, word(in.qs, i));
    }
}

// Of two groups the file has the first one's values in the lower halves of 32 bytes.
template <typename Columns>
inline void take_nibbles_K(Columns& out, int c, const uint8_t* qs) {
    for (int pair = 0; pair < 4; pair++, qs += 32) {
        for (int i = 0; i < 4; i++) {
            const uint32_t a = word(qs, i), b = word(qs, i + 4);
            set_word(out.qs[2 * pair], COLS * i + c, (a & LOW_NIBBLES) | (b & LOW_NIBBLES) << 4);
            set_word(out.qs[2 * pair + 1], COLS * i + c,
                     (a >> 4 & LOW_NIBBLES) | (b & ~LOW_NIBBLES));
        }
    }
}

inline void take_values(columns_q4_K& out, int c, const block_q4_K& in) {
    take_nibbles_K(out, c, in.qs);
}

// Bit g of the file's byte l is of value l of group g.
template <typename Columns>
inline void take_single_bits(Columns& out, int c, const uint8_t* bits) {
    for (int g = 0; g < 8; g++) {
        uint32_t w = 0;
        for (int i = 0; i < 8; i++) {
            w |= (word(bits, i) >> g & 0x01010101) << i;
        }
        set_word(out.qh[g], c, w);
    }
}

inline void take_values(columns_q5_K& out, int c, const block_q5_K& in) {
    take_nibbles_K(out, c, in.qs);
    take_single_bits(out, c, in.qh);
}

// Each half of the file's block has four groups: the lower halves of 64 bytes are the first two,
// the upper ones the others; and of 32 bytes two bits each belong to one of the four.
inline void take_values(columns_q6_K& out, int c, const block_q6_K& in) {
    for (int g = 0; g < 8; g++) {
        const uint8_t* ql = in.ql + g / 4 * 64 + g % 2 * 32;
        const uint8_t* qh = in.qh + g / 4 * 32;
        const int up = g % 4 / 2 * 4, bits = g % 4 * 2;
        for (int i = 0; i < 4; i++) {
            const uint32_t a = word(ql, i) >> up & LOW_NIBBLES;
            const uint32_t b = word(ql, i + 4) >> up & LOW_NIBBLES;
            set_word(out.qs[g], COLS * i + c, a | b << 4);
        }
        for (int part = 0; part < 2; part++) {
            uint32_t w = 0;
            for (int i = 0; i < 4; i++) {
                w |= (word(qh, 4 * part + i) >> bits & 0x03030303) << 2 * i;
            }
            set_word(out.qh[g][part], c, w);
        }
    }
}

// Of four groups the file has two bits each in a byte, of 32 bytes for each half of the block.
template <typename Columns>
inline void take_pairs_of_bits(Columns& out, int c, const uint8_t* qs) {
    for (int g = 0; g < 8; g++) {
        for (int part = 0; part < 2; part++) {
            uint32_t w = 0;
            for (int i = 0; i < 4; i++) {
                w |= (word(qs + g / 4 * 32, 4 * part + i) >> g % 4 * 2 & 0x03030303) << 2 * i;
            }
            set_word(out.qs[g], COLS * part + c, w);
        }
    }
}

inline void take_values(columns_q2_K& out, int c, const block_q2_K& in) {
    take_pairs_of_bits(out, c, in.qs);
}

inline void take_values(columns_q3_K& out, int c, const block_q3_K& in) {
    take_pairs_of_bits(out, c, in.qs);
    take_single_bits(out, c, in.hmask);
}

inline void take_values(columns_iq4_xs& out, int c, const block_iq4_xs& in) {
    take_nibbles(out, c, in.qs);
}

constexpr int64_t REPACK_BYTES = 1 << 20; // of weights: less is not worth a thread
constexpr unsigned REPACK_THREADS = 16;   // more wait for the memory

// Writes `rows` rows of `k` values, stored as a file has them, as columns; on all cores.
template <typename Columns>
void repack(void* to, const void* from, int64_t rows, int64_t k) {
    using Block = typename Columns::Block;
    static_assert(sizeof(Columns) == COLS * sizeof(Block), "a layout takes the file's bytes");
    const int64_t blocks = k / (32 * Columns::GROUPS);
    const auto part = [=](int64_t start, int64_t end) {
        const Block* in = (const Block*)from + start * COLS * blocks;
        Columns* out = (Columns*)to + start * blocks;
        for (int64_t i = start; i < end; i++, in += COLS * blocks) {
            for (int64_t b = 0; b < blocks; b++, out++) {
                for (int c = 0; c < COLS; c++) {
                    take_scales(*out, c, in[c * blocks + b]);
                    take_values(*out, c, in[c * blocks + b]);
                }
            }
        }
    };
    const int64_t heights = rows / COLS;
    const int64_t bytes = heights * blocks * sizeof(Columns);
    const int64_t n = std::clamp<int64_t>(
        std::min<int64_t>(std::thread::hardware_concurrency(), bytes / REPACK_BYTES), 1,
        REPACK_THREADS);
    std::vector<std::thread> others;
    for (int64_t i = 1; i < n; i++) {
        others.emplace_back(part, heights * i / n, heights * (i + 1) / n);
    }
    part(0, heights / n);
    for (std::thread& other : others) {
        other.join();
    }
}

} // namespace
