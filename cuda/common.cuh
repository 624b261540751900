// Shared by all kernels: reductions over a block, order-preserving keys of floats, conversions.
//
// nvcc compiles these files for a GPU. With MEDUSA_EMULATION a C++ compiler compiles them for the CPU:
// tests/emulation/emulation.h then defines CUDA's names, with one fiber per thread, so that tests need no GPU.
#pragma once

#include "args.h"
#ifdef MEDUSA_EMULATION
#include "emulation.h"
#else
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

// F16 from its bits. Buffers hold uint16_t, which the emulation has too, not __half.
__device__ inline float half_bits_to_float(uint16_t bits) {
#ifdef MEDUSA_EMULATION
    return emulated_half_to_float(bits);
#else
    return __half2float(__ushort_as_half(bits));
#endif
}

// Combining functions of the reductions. Both commute; on integers they are also exact, so that the order in which threads
// combine never changes a result.
struct Sum {
    template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};
struct Largest {
    template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};

// Returns the warp's result to all lanes: five exchanges between registers, no shared memory and no barrier.
template <class T, class Combine> __device__ inline T warp_reduce(T value, Combine combine) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    }
    return value;
}

// Returns the block's result to all threads. Every thread of the block must call it, and blocks are whole warps.
// `partial` takes WARP values, so a block has at most 32 warps: CUDA's limit of 1024 threads.
template <class T, class Combine> __device__ inline T block_reduce(T value, T identity, Combine combine) {
    __shared__ T partial[WARP];
    value = warp_reduce(value, combine);
    if (lane_id() == 0) {
        partial[warp_id()] = value;
    }
    __syncthreads();
    const int n_warps = blockDim.x / WARP;
    value = warp_reduce(lane_id() < n_warps ? partial[lane_id()] : identity, combine);
    __syncthreads(); // the next call overwrites `partial`, so all warps must have read it
    return value;
}

// Exclusive prefix sum: returns the sum over the threads before this one, and the block's sum in `total`. Called like
// `block_reduce`.
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
    __syncthreads(); // as in block_reduce
    *total = all;
    return before + inclusive - value;
}

// A key that orders like the floats: equal for 0 and -0 (adding 0 turns -0 into 0), and 0, the smallest, for NaN.
// Positive floats order as their bits do, negative ones in reverse.
__device__ inline uint32_t order_key(float value) {
    if (value != value) {
        return 0;
    }
    const uint32_t bits = __float_as_uint(value + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A rank orders (value, index): the larger value first, and of equal values the lower index. With the index in it all ranks of
// a row differ, so that any number of threads agree on one order. 8 bytes: the largest of a row is one reduction.
__device__ inline unsigned long long ranked(float value, int index) {
    return static_cast<unsigned long long>(order_key(value)) << 32 | static_cast<uint32_t>(~index);
}

__device__ inline int index_of(unsigned long long rank) { return static_cast<int>(~static_cast<uint32_t>(rank)); }

// Weights as integers, 2^40 for 1: their sum is the same in any order, where a sum of floats would depend on which thread
// adds first. 2^23 weights of 1 still fit 64 bits.
constexpr float FIXED_ONE = 1099511627776.0f;

__device__ inline unsigned long long fixed(float weight) {
    return static_cast<unsigned long long>(weight * FIXED_ONE); // weights are in [0, 1]
}
