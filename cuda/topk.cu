// The likeliest tokens of each row of logits, with their probabilities; and which paths to go on from.

#include "select.cuh"

// Mirrored by `TopKArgs` in src/gpu/kernels.rs.
struct TopK {
    const float *logits;      // [n_rows, n]
    const int32_t *token_map; // the token of each of n places; null: the place itself
    int32_t *tokens;          // [n_rows, k], best first; of equal ones the first places
    float *p;                 // [n_rows, k]
    int32_t n;
    int32_t k;                // at most n, and 64
};

// The k-th of the threads' own best ranks, best first: at least k ranks of the row are as good.
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

// Blocks: (rows).
KERNEL __launch_bounds__(SELECT_THREADS) top_k(TopK t) {
    __shared__ List list;
    __shared__ unsigned long long sorted[LIST];
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

    if (collect(row, t.n, least_of_best(own, t.k), list) <= LIST) {
        sort(list, list.n, sorted);
    } else {
        // A few threads met nearly all large values: find them one after the other.
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
        const int place = place_of(sorted[i]);
        const int64_t at = static_cast<int64_t>(blockIdx.x) * t.k + i;
        t.tokens[at] = t.token_map ? t.token_map[place] : place;
        t.p[at] = expf(value_of(sorted[i]) - max) / sum;
    }
}
EMULATED(top_k)

// Ranges of a head's probability that are calibrated apart; as in src/speculate/calibration.rs.
constexpr int N_BINS = 12;

// Mirrored by `ChoosePathsArgs` in src/gpu/kernels.rs.
struct ChoosePaths {
    const float *p;            // [n_paths, k]: what the head said of each candidate, best first
    const int32_t *candidates; // [n_paths, k]: the tokens
    const float *path_q;       // [n_paths]
    const int32_t *origins;    // [n_paths]: whose path it is
    const float *trust;        // by origin
    const float *ratios;       // [N_BINS]: how often candidates are right, against what the head says
    float *next_q;             // [n_next]
    int32_t *next_origins;
    int32_t *next_parents;     // the path that each goes on from
    int32_t *next_tokens;      // and with which token
    float lowest;              // the lower end of the first range
    float highest;             // no candidate is surer
    int32_t n_paths;
    int32_t k;
    int32_t n_next;            // at most n_paths * k, and that at most LIST
    int32_t n_origins;
};

// Probability that a candidate is accepted if its parent is.
__device__ inline float calibrated(const ChoosePaths &c, float p, float trust) {
    const float at = logf(fmaxf(p, c.lowest) / c.lowest) / logf(1.0f / c.lowest) * N_BINS;
    const int bin = min(static_cast<int>(at), N_BINS - 1);
    return fminf(fmaxf(p * c.ratios[bin] * trust, 0.0f), c.highest);
}

// The candidates that are likeliest to be reached, over all sequences: the next head goes on from them. One block.
KERNEL __launch_bounds__(SELECT_THREADS) choose_paths(ChoosePaths c) {
    __shared__ List list;
    __shared__ unsigned long long sorted[LIST];
    __shared__ float q[LIST];
    const int n = c.n_paths * c.k;
    for (int path = threadIdx.x; path < c.n_paths; path += SELECT_THREADS) {
        const float trust = c.trust[max(0, min(c.origins[path], c.n_origins - 1))];
        float above = c.path_q[path];
        for (int i = 0; i < c.k; ++i) {
            // A calibrated sibling may come out above a better one; the order must hold all the same.
            const int at = path * c.k + i;
            above = fminf(c.path_q[path] * calibrated(c, c.p[at], trust), above);
            q[at] = above;
            list.ranks[at] = ranked(above * trust, at);
        }
    }
    __syncthreads();
    sort(list, n, sorted);
    for (int i = threadIdx.x; i < c.n_next; i += SELECT_THREADS) {
        const int at = place_of(sorted[i]), path = at / c.k;
        c.next_q[i] = q[at];
        c.next_origins[i] = c.origins[path];
        c.next_parents[i] = path;
        c.next_tokens[i] = c.candidates[at];
    }
}
EMULATED(choose_paths)
