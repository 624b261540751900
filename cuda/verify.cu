// Chooses each row's next token, and walks down each sequence's tree along the choices.
//
// Shapes are in args.h, VerifyArgs. Launch: one block of SELECT_THREADS per row, no dynamic shared memory; `n_done` is zero
// before the launch and after it.
//
// A token is chosen as src/engine/sampler.rs chooses it: the largest logit, or a draw from what top-k, top-p, min-p and
// temperature leave, with the same Philox number. Weights are added as integers (see `fixed`), so the choice does not depend
// on the order of threads. Where CPU and GPU round an exponential differently, a draw at the edge of two tokens may differ.
//
// Never stored: probabilities and sorted rows; four bytes per row are written. A row is read once where the choice is greedy,
// three times where its candidates fit shared memory, and up to 64 times more per filter where they do not (`draw_from_row`).

#include "select.cuh"

// A number in [0, 1) from Philox4x32-10, keyed by seed and position: see src/engine/sampler.rs for source and test vectors.
__device__ inline double uniform(const RowRule &rule) {
    uint32_t counter[4] = {rule.position[0], rule.position[1], 0, 0};
    uint32_t key[2] = {rule.seed[0], rule.seed[1]};
    for (int round = 0; round < 10; ++round) {
        const uint32_t a_high = __umulhi(0xD2511F53u, counter[0]), a_low = 0xD2511F53u * counter[0];
        const uint32_t b_high = __umulhi(0xCD9E8D57u, counter[2]), b_low = 0xCD9E8D57u * counter[2];
        counter[0] = b_high ^ counter[1] ^ key[0];
        counter[1] = b_low;
        counter[2] = a_high ^ counter[3] ^ key[1];
        counter[3] = a_low;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    const unsigned long long bits = (static_cast<unsigned long long>(counter[0]) << 32 | counter[1]) >> 11;
    return static_cast<double>(bits) / 9007199254740992.0;
}

// Beyond this distance from the largest logit tokens weigh nothing in top-p: e^-32 of a whole vocabulary is below rounding.
// As in src/vector.rs.
constexpr float NEGLIGIBLE = 32.0f;

// A token's weight for top-p, which looks at probabilities before temperature ...
__device__ inline unsigned long long mass(float below_max) {
    return below_max > -NEGLIGIBLE ? fixed(expf(below_max)) : 0;
}

// ... and for the draw.
__device__ inline unsigned long long tempered(const RowRule &rule, float below_max) {
    return fixed(expf(below_max * rule.inverse_temperature));
}

// A share of a sum, at least 1: top-p keeps at least one token.
__device__ inline unsigned long long share_of(double share, unsigned long long sum) {
    const unsigned long long part = static_cast<unsigned long long>(share * static_cast<double>(sum));
    return part > 0 ? part : 1;
}

// The point of a sum that the row's uniform number selects; below the sum.
__device__ inline unsigned long long target_in(const RowRule &rule, unsigned long long sum) {
    const unsigned long long target = static_cast<unsigned long long>(uniform(rule) * static_cast<double>(sum));
    return target < sum ? target : sum - 1;
}

// Distances from the largest logit that `collect_enough` tries.
constexpr int N_REACHES = 6;

// Collects the tokens within the widest distance of which the list holds all. Returns whether the list contains all tokens
// that the filters may keep. `all` gets the mass of the row, which top-p is a share of. One pass counts all distances at once,
// a second one collects.
__device__ inline bool collect_enough(const RowRule &rule, const float *row, int n, float max, List &list,
                                      unsigned long long *all) {
    // The last one is min-p's: beyond it no token counts.
    const float reaches[N_REACHES] = {2.0f, 4.0f, 7.0f, 11.0f, 16.0f, -rule.min_logit};
    unsigned long long counts[N_REACHES / 2] = {}; // two in each: a row has fewer than 2^32 values
    unsigned long long row_mass = 0;
    for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
        const float below = row[i] - max;
#pragma unroll
        for (int r = 0; r < N_REACHES; ++r) {
            counts[r / 2] += below >= -reaches[r] ? 1ull << (r % 2 * 32) : 0;
        }
        row_mass += mass(below);
    }
    *all = block_reduce(row_mass, 0ull, Sum());
    float reach = 0.0f;
    int n_within = 0;
#pragma unroll
    for (int r = 0; r < N_REACHES; ++r) {
        const unsigned long long both = r % 2 == 0 ? block_reduce(counts[r / 2], 0ull, Sum()) : counts[r / 2];
        counts[r / 2] = both;
        const int count = static_cast<int>(both >> (r % 2 * 32));
        if (count <= MAX_CANDIDATES && count > n_within) {
            n_within = count;
            reach = reaches[r];
        }
    }
    if (n_within == 0) {
        return false;
    }
    collect(row, n, ranked(max - reach, n) & ~0xffffffffull, list);
    if (n_within != list.n) {
        return false; // `max - reach` was rounded across a value
    }
    if (n_within == n || (rule.top_k > 0 && n_within >= rule.top_k) || reach >= -rule.min_logit) {
        return true;
    }
    if (rule.top_k > 0 || rule.top_p >= 1.0f) {
        return false;
    }
    unsigned long long within = 0;
    for (int i = threadIdx.x; i < n_within; i += SELECT_THREADS) {
        within += mass(value_of(list.ranks[i]) - max);
    }
    return block_reduce(within, 0ull, Sum()) >= share_of(rule.top_p, *all);
}

// Draws from a list that contains all that the filters may keep. `sorted` holds MAX_CANDIDATES ranks. Exactly one thread
// writes `n_kept` and one writes `drawn`: the intervals of the cumulative weights do not overlap.
__device__ inline int draw_from_list(const RowRule &rule, const List &list, float max, unsigned long long all,
                                     unsigned long long *sorted) {
    __shared__ unsigned long long weights[MAX_CANDIDATES];
    __shared__ int n_kept, drawn;
    constexpr int EACH = MAX_CANDIDATES / SELECT_THREADS;
    sort(list, list.n, sorted);
    int n = rule.top_k > 0 ? min(rule.top_k, list.n) : list.n;

    if (rule.top_p < 1.0f) {
        unsigned long long own = 0, sum;
        for (int i = 0; i < EACH; ++i) {
            const int at = threadIdx.x * EACH + i;
            own += at < n ? mass(value_of(sorted[at]) - max) : 0;
        }
        unsigned long long before = block_sum_before(own, &sum);
        const unsigned long long enough = share_of(rule.top_p, rule.top_k > 0 ? sum : all);
        if (threadIdx.x == 0) {
            n_kept = n;
        }
        __syncthreads();
        for (int i = 0; i < EACH; ++i) {
            const int at = threadIdx.x * EACH + i;
            const unsigned long long through = before + (at < n ? mass(value_of(sorted[at]) - max) : 0);
            if (before < enough && enough <= through) {
                n_kept = at + 1;
            }
            before = through;
        }
        __syncthreads();
        n = n_kept;
    }
    int above = 0;
    for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
        above += value_of(sorted[i]) - max >= rule.min_logit;
    }
    n = block_reduce(above, 0, Sum());

    unsigned long long sum = 0;
    for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
        weights[i] = tempered(rule, value_of(sorted[i]) - max);
        sum += weights[i];
    }
    sum = block_reduce(sum, 0ull, Sum());
    const unsigned long long target = target_in(rule, sum);
    for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
        unsigned long long before = 0;
        for (int j = 0; j < n; ++j) {
            before += index_of(sorted[j]) < index_of(sorted[i]) ? weights[j] : 0;
        }
        if (before <= target && target - before < weights[i]) {
            drawn = index_of(sorted[i]);
        }
    }
    __syncthreads();
    return drawn;
}

// The lowest rank of the smallest set of best values that weigh `enough` together, among ranks of at least `floor`; `floor` if
// all together weigh less. Bisection over the 64 bits of a rank: one pass over the row per step, until at most one value
// lies between the bounds.
template <class Weight>
__device__ inline unsigned long long threshold(const float *row, int n, unsigned long long floor, unsigned long long best,
                                               unsigned long long enough, Weight weight) {
    unsigned long long low = floor, high = best + 1; // invariant: ranks >= low weigh enough, ranks >= high do not
    while (high - low > 1) {
        const unsigned long long middle = low + (high - low) / 2;
        unsigned long long sum = 0, n_between = 0;
        for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
            const unsigned long long rank = ranked(row[i], i);
            sum += rank >= middle ? weight(row[i]) : 0;
            n_between += rank >= low && rank < high;
        }
        sum = block_reduce(sum, 0ull, Sum());
        if (block_reduce(n_between, 0ull, Sum()) <= 1) {
            break; // at most one value lies between, so `low` separates the same sets
        }
        if (sum >= enough) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Draws from a whole row, where the filters leave more than a list holds: high temperatures without top-k or min-p.
__device__ inline int draw_from_row(const RowRule &rule, const float *row, int n, unsigned long long best) {
    __shared__ int drawn;
    const float max = value_of(best);
    unsigned long long least = 1ull << 32; // the key of NaN is 0
    if (rule.top_k > 0 && rule.top_k < n) {
        least = threshold(row, n, least, best, rule.top_k, [](float) { return 1ull; });
    }
    if (rule.top_p < 1.0f) {
        unsigned long long sum = 0;
        for (int i = threadIdx.x; i < n; i += SELECT_THREADS) {
            sum += ranked(row[i], i) >= least ? mass(row[i] - max) : 0;
        }
        sum = block_reduce(sum, 0ull, Sum());
        least = threshold(row, n, least, best, share_of(rule.top_p, sum), [=](float v) { return mass(v - max); });
    }
    const auto weight = [=](int i) {
        const bool kept = ranked(row[i], i) >= least && row[i] - max >= rule.min_logit;
        return kept ? tempered(rule, row[i] - max) : 0ull;
    };
    // Each thread sums a run of consecutive tokens. The one whose run contains the target finds the token in it.
    const int run = (n + SELECT_THREADS - 1) / SELECT_THREADS;
    const int first = min(n, static_cast<int>(threadIdx.x) * run), end = min(n, first + run);
    unsigned long long own = 0, sum;
    for (int i = first; i < end; ++i) {
        own += weight(i);
    }
    unsigned long long before = block_sum_before(own, &sum);
    const unsigned long long target = target_in(rule, sum);
    if (before <= target && target - before < own) {
        int i = first;
        for (; i < end - 1 && target - before >= weight(i); ++i) {
            before += weight(i);
        }
        drawn = i;
    }
    __syncthreads();
    return drawn;
}

// Walks down a sequence's tree along the chosen tokens, and resets its counter. Called by one warp, which looks at 32 rows of
// the tree per step; all lanes take the same branch, since `__ballot_sync` gives all the same value.
__device__ inline void walk(const VerifyArgs &v, int sequence) {
    const volatile int32_t *chosen = v.chosen; // other blocks wrote it: no cached or hoisted loads
    const Span span = v.spans[sequence];
    int at = span.first;
    for (bool down = true; down;) {
        down = false;
        for (int from = at + 1; from < span.first + span.n && !down; from += WARP) {
            const int row = from + lane_id();
            const bool child = row < span.first + span.n && v.rules[row].parent == at && v.rules[row].token == chosen[at];
            const unsigned found = __ballot_sync(ALL_LANES, child);
            if (found != 0) {
                at = from + __ffs(found) - 1;
                down = true;
            }
        }
    }
    if (lane_id() == 0) {
        const bool known = chosen[at] >= 0;
        v.last[sequence] = v.rules[known ? at : span.first].logits_row;
        v.roots[sequence] = known ? chosen[at] : 0;
        v.n_done[sequence] = 0;
    }
}

// One block: one row. The last block of a sequence to finish walks down its tree, so that no second launch is needed: at most
// one block per sequence sees the counter reach the number of rows.
KERNEL __launch_bounds__(SELECT_THREADS, 2) verify(VerifyArgs v) {
    __shared__ List list;
    __shared__ unsigned long long sorted[MAX_CANDIDATES];
    __shared__ bool is_last;
    const RowRule rule = v.rules[blockIdx.x];
    const float *row = v.logits + static_cast<int64_t>(rule.logits_row) * v.n_vocab;

    int token = -1;
    if (!rule.on_host) {
        unsigned long long best = 0;
        for (int i = threadIdx.x; i < v.n_vocab; i += SELECT_THREADS) {
            const unsigned long long rank = ranked(row[i], i);
            best = rank > best ? rank : best;
        }
        best = block_reduce(best, 0ull, Largest());
        token = index_of(best);
        const float max = value_of(best);
        if (rule.inverse_temperature > 0.0f && max - max == 0.0f) { // drawn; greedy where the largest is not finite
            unsigned long long all;
            token = collect_enough(rule, row, v.n_vocab, max, list, &all)
                        ? draw_from_list(rule, list, max, all, sorted)
                        : draw_from_row(rule, row, v.n_vocab, best);
        }
    }
    if (threadIdx.x == 0) {
        v.chosen[blockIdx.x] = token;
        __threadfence(); // publishes `chosen` before the counter ...
        is_last = atomicAdd(&v.n_done[rule.sequence], 1u) + 1 == static_cast<uint32_t>(v.spans[rule.sequence].n);
        __threadfence(); // ... and no read of other rows' `chosen` moves before it
    }
    __syncthreads();
    if (is_last && warp_id() == 0) {
        walk(v, rule.sequence);
    }
}
EMULATED(verify)
