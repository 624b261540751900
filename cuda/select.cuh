// Choosing among the values of a row of logits, one block to a row.
#pragma once
#include "common.cuh"

constexpr int SELECT_THREADS = 512;
// Values that are looked at together in shared memory.
constexpr int LIST = 1024;

// The best values of a row as ranks (see `ranked`), in any order.
struct List {
    unsigned long long ranks[LIST];
    int n;
};

// The value in a rank.
__device__ inline float value_of(unsigned long long rank) {
    const uint32_t key = static_cast<uint32_t>(rank >> 32);
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Fills the list with all values of at least this rank. Returns how many there are, which may be more than fit.
__device__ inline int collect(const float *row, int n, unsigned long long least, List &list) {
    if (threadIdx.x == 0) {
        list.n = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
        const unsigned long long rank = ranked(row[i], i);
        if (rank >= least) {
            const int at = atomicAdd(&list.n, 1);
            if (at < LIST) {
                list.ranks[at] = rank;
            }
        }
    }
    __syncthreads();
    return list.n;
}

// Fills `sorted` with the `n` ranks of a list, best first.
__device__ inline void sort(const List &list, int n, unsigned long long *sorted) {
    for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
        int better = 0;
        for (int j = 0; j < n; ++j) {
            better += list.ranks[j] > list.ranks[i];
        }
        sorted[better] = list.ranks[i];
    }
    __syncthreads();
}
