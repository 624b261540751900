// Vectors with a lane for each column: eight columns in 256 bits, sixteen in 512. The kernels of
// few-rows.cpp are written once for both.
//
// Bytes of weights are multiplied by fours: a 32-bit lane holds four values of its column, and four
// activations are broadcast to all lanes. Weights are the unsigned operand.
#pragma once

#include "ggml-impl.h"

#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

// Kernels are one function each, and all that they call is a part of them: without this, compilers
// leave calls in the innermost loops.
//
// FEW_ROWS_NOW(v) has the vector v computed at this place and in a register: compilers put sums off
// until all their parts are there, and repeat loads, which takes more registers than there are.
#if defined(_MSC_VER)
#define FEW_ROWS_INLINE
#define FEW_ROWS_KERNEL __declspec(noinline)
#define FEW_ROWS_NOW(v)
#else
#define FEW_ROWS_INLINE __attribute__((always_inline))
#define FEW_ROWS_KERNEL __attribute__((noinline))
#define FEW_ROWS_NOW(v) asm("" : "+x"(v))
#endif

namespace {

// Calls f with 0 .. N - 1 as types, so that they can be immediates.
template <int... I, typename F>
FEW_ROWS_INLINE inline void unroll_(std::integer_sequence<int, I...>, F f) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
FEW_ROWS_INLINE inline void unroll(F f) {
    unroll_(std::make_integer_sequence<int, N>{}, f);
}

// Eight columns, in AVX2 or AVX-VNNI.
struct Lanes8 {
    using Ints = __m256i;
    using Floats = __m256;
    static constexpr int BLOCKS = 1;
#if defined(__AVXVNNI__)
    static constexpr bool IS_SIGNED = false;
#else
    static constexpr bool IS_SIGNED = true; // values of 8 bits are multiplied as they are
#endif

    explicit Lanes8(ptrdiff_t) {}

    // 32 bytes.
    Ints load(const void* p) const { return _mm256_loadu_si256((const __m256i*)p); }
    // Eight bytes, one for each lane.
    Ints load_bytes(const uint8_t* p) const {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    }
    Ints load_bytes(const int8_t* p) const {
        return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
    }
    Floats load_halves(const ggml_half* p) const {
        return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    }

    static Ints zero() { return _mm256_setzero_si256(); }
    static Floats zero_floats() { return _mm256_setzero_ps(); }
    static Ints bytes(int v) { return _mm256_set1_epi8((char)v); }
    static Ints ints(int32_t v) { return _mm256_set1_epi32(v); }
    static Floats floats(const float* v) { return _mm256_broadcast_ss(v); }
    // Four bytes in every lane.
    static Ints repeat(const void* p) {
        return _mm256_castps_si256(_mm256_broadcast_ss((const float*)p));
    }

    static Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
    static Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
    static Ints differ(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
    static Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
    // By N bits to the left, or -N to the right; bits cross the bytes of 16-bit numbers.
    template <int N>
    static Ints shift(Ints a) {
        if constexpr (N >= 0) {
            return _mm256_slli_epi16(a, N);
        } else {
            return _mm256_srli_epi16(a, -N);
        }
    }
    // 32-bit numbers by n bits.
    static Ints shift_right(Ints a, int n) { return _mm256_srli_epi32(a, n); }
    // The bytes at the places 0..15 in a table.
    static Ints look_up(Ints index, const int8_t* table) {
        const __m128i values = _mm_loadu_si128((const __m128i*)table);
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(values), index);
    }

    static Floats to_floats(Ints a) { return _mm256_cvtepi32_ps(a); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
    static Floats negate(Floats a) { return _mm256_sub_ps(_mm256_setzero_ps(), a); }
    static Floats mul_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
    static void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }

    // A sum of products of N fours: values of at most MOST with activations of -127 .. 127.
    template <int MOST>
    struct Dot {
        Ints sum;
#if !defined(__AVXVNNI__)
        Ints pairs; // sums of two products, in 16 bits
#endif

        // Adds the I-th of N fours.
        template <int I, int N>
        FEW_ROWS_INLINE void add(Ints v, Ints x) {
#if defined(__AVXVNNI__)
            sum = _mm256_dpbusd_avx_epi32(I == 0 ? zero() : sum, v, x);
#else
            constexpr bool HAS_SIGN = MOST == 255;
            // So many sums of two products fit into 16 bits.
            constexpr int FIT = 32767 / (2 * 127 * (HAS_SIGN ? 127 : MOST));
            constexpr int PART = FIT >= N ? N : FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
            static_assert(FIT >= 1 && N % PART == 0, "whole parts");
            // maddubs needs an unsigned operand: the activations take the values' signs.
            const Ints two = HAS_SIGN
                                 ? _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v))
                                 : _mm256_maddubs_epi16(v, x);
            Ints now = I % PART == 0 ? two : _mm256_add_epi16(pairs, two);
            FEW_ROWS_NOW(now);
            pairs = now;
            if constexpr (I % PART == PART - 1) {
                const Ints four = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
                sum = I < PART ? four : _mm256_add_epi32(sum, four);
            }
#endif
        }
    };
};

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) &&                      \
    defined(__AVX512VNNI__)
#define FEW_ROWS_LANES16

// Sixteen columns: the upper half is of the block `next` bytes after a lower half's.
struct Lanes16 {
    using Ints = __m512i;
    using Floats = __m512;
    static constexpr int BLOCKS = 2;
    static constexpr bool IS_SIGNED = false;

    ptrdiff_t next;
    explicit Lanes16(ptrdiff_t next) : next(next) {}

    Ints load(const void* p) const {
        const __m256i lo = _mm256_loadu_si256((const __m256i*)p);
        const __m256i hi = _mm256_loadu_si256((const __m256i*)((const char*)p + next));
        return _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
    }
    __m128i load_eight(const void* p) const {
        const __m128i lo = _mm_loadl_epi64((const __m128i*)p);
        return _mm_unpacklo_epi64(lo, _mm_loadl_epi64((const __m128i*)((const char*)p + next)));
    }
    Ints load_bytes(const uint8_t* p) const { return _mm512_cvtepu8_epi32(load_eight(p)); }
    Ints load_bytes(const int8_t* p) const { return _mm512_cvtepi8_epi32(load_eight(p)); }
    Floats load_halves(const ggml_half* p) const {
        const __m128i lo = _mm_loadu_si128((const __m128i*)p);
        const __m128i hi = _mm_loadu_si128((const __m128i*)((const char*)p + next));
        return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(lo), hi, 1));
    }

    static Ints zero() { return _mm512_setzero_si512(); }
    static Floats zero_floats() { return _mm512_setzero_ps(); }
    static Ints bytes(int v) { return _mm512_set1_epi8((char)v); }
    static Ints ints(int32_t v) { return _mm512_set1_epi32(v); }
    static Floats floats(const float* v) { return _mm512_set1_ps(*v); }
    static Ints repeat(const void* p) {
        int32_t v;
        memcpy(&v, p, sizeof(v));
        return _mm512_set1_epi32(v);
    }

    static Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
    static Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
    static Ints differ(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
    static Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
    template <int N>
    static Ints shift(Ints a) {
        if constexpr (N >= 0) {
            return _mm512_slli_epi16(a, N);
        } else {
            return _mm512_srli_epi16(a, -N);
        }
    }
    static Ints shift_right(Ints a, int n) { return _mm512_srli_epi32(a, n); }
    static Ints look_up(Ints index, const int8_t* table) {
        const __m128i values = _mm_loadu_si128((const __m128i*)table);
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), index);
    }

    static Floats to_floats(Ints a) { return _mm512_cvtepi32_ps(a); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats negate(Floats a) { return _mm512_sub_ps(_mm512_setzero_ps(), a); }
    static Floats mul_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }

    template <int>
    struct Dot {
        Ints sum;

        template <int I, int>
        FEW_ROWS_INLINE void add(Ints v, Ints x) {
            sum = _mm512_dpbusd_epi32(I == 0 ? zero() : sum, v, x);
        }
    };
};

using Lanes = Lanes16;
#else
using Lanes = Lanes8;
#endif

} // namespace
