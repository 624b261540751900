// Choosing among the values of a row of logits, one block of SELECT_THREADS to a row.
//
// A row of 128k logits is 512 KiB and fits no shared memory, so it is read from global memory or L2 again for each pass.
// These functions collect the few candidates that matter in shared memory, where the rest of the work is done.
#pragma once
#include "common.cuh"

// Candidates of a row as ranks (see `ranked`), in any order. 8 KiB of shared memory.
struct List {
    unsigned long long ranks[MAX_CANDIDATES];
    int n;
};

// The value in a rank: the inverse of `order_key`.
__device__ inline float value_of(unsigned long long rank) {
    const uint32_t key = static_cast<uint32_t>(rank >> 32);
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Fills the list with all values of at least this rank. Returns their number, which may exceed what the list holds: then the
// list is incomplete, and the caller must not use it. The order of ranks depends on the race of the atomics.
__device__ inline int collect(const float *row, int n, unsigned long long least, List &list) {
    if (threadIdx.x == 0) {
        list.n = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
        const unsigned long long rank = ranked(row[i], i);
        if (rank >= least) {
            const int at = atomicAdd(&list.n, 1);
            if (at < MAX_CANDIDATES) {
                list.ranks[at] = rank;
            }
        }
    }
    __syncthreads();
    return list.n;
}

// Writes the list's `n` ranks to `sorted`, best first. Each thread counts the better ranks of its own: n^2 comparisons, at
// most 2048 per thread from shared memory in broadcasts, and one barrier where a bitonic sort needs 55.
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
