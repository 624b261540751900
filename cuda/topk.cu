// The most probable tokens of each row of logits with their probabilities, and the paths that the next head continues.
//
// Shapes are in args.h. Launch: `top_k` one block of SELECT_THREADS per row, `choose_paths` a single one; no dynamic shared
// memory. Both return the same bytes for the same input, whatever the order of threads: ranks differ, so no tie is left to a
// race. Only `p` depends on how a warp adds floats, which is fixed.
//
// Never stored: the softmax of a row. `top_k` reads a row three times (largest value, sum, candidates) and writes k tokens and
// k probabilities.

#include "select.cuh"

// The k-th best of the threads' own best ranks: at least k ranks of the row reach it. So what reaches it contains the row's
// k best, and on most rows hardly more. k is at most SELECT_THREADS.
__device__ inline unsigned long long least_of_best(unsigned long long own, int k) {
    __shared__ unsigned long long bests[SELECT_THREADS];
    __shared__ unsigned long long least;
    bests[threadIdx.x] = own;
    __syncthreads();
    int better = 0;
    for (int i = 0; i < SELECT_THREADS; ++i) {
        better += bests[i] > own;
    }
    if (better == k - 1 && own > 0) {
        least = own;
    }
    __syncthreads();
    return least;
}

// One block: one row.
KERNEL __launch_bounds__(SELECT_THREADS) top_k(TopKArgs t) {
    __shared__ List list;
    __shared__ unsigned long long sorted[MAX_CANDIDATES];
    const float *row = t.logits + static_cast<int64_t>(blockIdx.x) * t.n;

    unsigned long long own = 0;
    for (int i = threadIdx.x; i < t.n; i += SELECT_THREADS) {
        const unsigned long long rank = ranked(row[i], i);
        own = rank > own ? rank : own;
    }
    const unsigned long long best = block_reduce(own, 0ull, Largest());
    const float max = value_of(best);
    float sum = 0.0f;
    for (int i = threadIdx.x; i < t.n; i += SELECT_THREADS) {
        sum += expf(row[i] - max);
    }
    sum = block_reduce(sum, 0.0f, Sum());

    if (collect(row, t.n, least_of_best(own, t.k), list) <= MAX_CANDIDATES) {
        sort(list, list.n, sorted);
    } else {
        // Few threads own nearly all large values, as with a period of SELECT_THREADS: find them one by one, in k passes.
        unsigned long long above = ~0ull;
        for (int i = 0; i < t.k; ++i) {
            unsigned long long next = 0;
            for (int j = threadIdx.x; j < t.n; j += SELECT_THREADS) {
                const unsigned long long rank = ranked(row[j], j);
                next = rank < above && rank > next ? rank : next;
            }
            above = block_reduce(next, 0ull, Largest());
            if (threadIdx.x == 0) {
                sorted[i] = above;
            }
        }
        __syncthreads();
    }
    for (int i = threadIdx.x; i < t.k; i += SELECT_THREADS) {
        const int column = index_of(sorted[i]);
        const int64_t at = static_cast<int64_t>(blockIdx.x) * t.k + i;
        t.tokens[at] = t.token_map ? t.token_map[column] : column;
        t.p[at] = expf(value_of(sorted[i]) - max) / sum;
    }
}
EMULATED(top_k)

// Probability that a candidate is accepted if its parent is. Twin: Calibration::estimate in src/speculate/calibration.rs.
__device__ inline float calibrated(const ChoosePathsArgs &c, float p, float trust) {
    const float at = logf(fmaxf(p, c.lowest) / c.lowest) / logf(1.0f / c.lowest) * N_BINS;
    const int bin = min(static_cast<int>(at), N_BINS - 1);
    return fminf(fmaxf(p * c.ratios[bin] * trust, 0.0f), c.highest);
}

// Chooses the candidates most likely to be accepted, over all sequences: the next head continues them. One block, since the
// choice is global and at most MAX_CANDIDATES are sorted.
KERNEL __launch_bounds__(SELECT_THREADS) choose_paths(ChoosePathsArgs c) {
    __shared__ List list;
    __shared__ unsigned long long sorted[MAX_CANDIDATES];
    __shared__ float q[MAX_CANDIDATES];
    const int n = c.n_paths * c.k;
    for (int path = threadIdx.x; path < c.n_paths; path += SELECT_THREADS) {
        const float trust = c.trust[max(0, min(c.origins[path], c.n_origins - 1))];
        float above = c.path_q[path];
        for (int i = 0; i < c.k; ++i) {
            // Calibration may put a sibling above a better one. The minimum keeps the head's order.
            const int at = path * c.k + i;
            above = fminf(c.path_q[path] * calibrated(c, c.p[at], trust), above);
            q[at] = above;
            list.ranks[at] = ranked(above * trust, at);
        }
    }
    __syncthreads();
    sort(list, n, sorted);
    for (int i = threadIdx.x; i < c.n_next; i += SELECT_THREADS) {
        const int at = index_of(sorted[i]), path = at / c.k;
        c.next_q[i] = q[at];
        c.next_origins[i] = c.origins[path];
        c.next_parents[i] = path;
        c.next_tokens[i] = c.candidates[at];
    }
}
EMULATED(choose_paths)
