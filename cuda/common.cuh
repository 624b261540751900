// What the kernels share: reductions over a block, order-preserving keys of floats, conversions.
//
// The same files are compiled for a GPU by nvcc and, with MEDUSA_EMULATION, for the CPU by a C++ compiler behind
// tests/emulation/emulation.h, which gives the names used here their meaning with one fiber per thread.
#pragma once

#ifdef MEDUSA_EMULATION
#include "emulation.h"
#else
#include <cstdint>
#include <cuda_fp16.h>
#define KERNEL extern "C" __global__ void
#define EMULATED(kernel)
#define DYNAMIC_SHARED(type, name)                                       \
    extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
    type *name = reinterpret_cast<type *>(dynamic_shared_bytes)
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ inline int lane_id() { return threadIdx.x % WARP; }
__device__ inline int warp_id() { return threadIdx.x / WARP; }

// A half-precision number from its bits.
__device__ inline float half_bits_to_float(uint16_t bits) {
#ifdef MEDUSA_EMULATION
    return emulated_half_to_float(bits);
#else
    return __half2float(__ushort_as_half(bits));
#endif
}

// What two values become; all of them associative and commutative, so that the order of threads does not matter.
struct Sum {
    template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Largest {
    template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// All lanes get the warp's result.
template <class T, class Combine> __device__ inline T warp_reduce(T value, Combine combine) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// All threads of the block get its result. Every thread must call it, in blocks of whole warps.
template <class T, class Combine> __device__ inline T block_reduce(T value, T identity, Combine combine) {
    __shared__ T partial[WARP];
    value = warp_reduce(value, combine);
    if (lane_id() == 0) {
        partial[warp_id()] = value;
    }
    __syncthreads();
    const int n_warps = blockDim.x / WARP;
    value = warp_reduce(lane_id() < n_warps ? partial[lane_id()] : identity, combine);
    __syncthreads(); // `partial` is free again
    return value;
}

// Each thread gets the sum of the values of the threads before it, and all of them the sum of all.
__device__ inline unsigned long long block_sum_before(unsigned long long value, unsigned long long *total) {
    __shared__ unsigned long long partial[WARP];
    unsigned long long inclusive = value;
    for (int distance = 1; distance < WARP; distance *= 2) {
        const unsigned long long other = __shfl_up_sync(ALL_LANES, inclusive, distance);
        inclusive += lane_id() >= distance ? other : 0;
    }
    if (lane_id() == WARP - 1) {
        partial[warp_id()] = inclusive;
    }
    __syncthreads();
    unsigned long long before = 0, all = 0;
    for (int warp = 0; warp < static_cast<int>(blockDim.x) / WARP; ++warp) {
        before += warp < warp_id() ? partial[warp] : 0;
        all += partial[warp];
    }
    __syncthreads();
    *total = all;
    return before + inclusive - value;
}

// A number that orders floats: larger for larger values, equal for 0 and -0, smallest of all for NaN.
__device__ inline uint32_t order_key(float value) {
    if (value != value) {
        return 0;
    }
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Orders (value, place): the larger value, and of equal ones the first place.
__device__ inline unsigned long long ranked(float value, int place) {
    return static_cast<unsigned long long>(order_key(value)) << 32 | static_cast<uint32_t>(~place);
}

__device__ inline int place_of(unsigned long long rank) { return static_cast<int>(~static_cast<uint32_t>(rank)); }

// Weights as whole numbers, so that their sum is the same in any order: 2^40 is 1.
constexpr float FIXED_ONE = 1099511627776.0f;

__device__ inline unsigned long long fixed(float weight) {
    return static_cast<unsigned long long>(weight * FIXED_ONE); // weights are in [0, 1]
}
