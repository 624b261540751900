// What each row's sequence goes on with, and how far down its tree that leads.
//
// A row's token is chosen as src/engine/sampler.rs chooses it: the largest logit, or one drawn from what top-k, top-p, min-p
// and temperature leave, by the same number from the same generator. Weights are added up as whole numbers, so the choice does
// not depend on the order in which threads come.

#include "select.cuh"

// How a row's token is chosen. Mirrored by `RowRule` in src/gpu/kernels.rs.
struct RowRule {
    uint32_t seed[2];          // low and high half
    uint32_t position[2];
    float inverse_temperature; // 0: the largest logit
    float top_p;               // 1: all
    float min_logit;           // ln(min_p): how far below the largest; -inf: all
    int32_t top_k;             // 0: all
    int32_t logits_row;        // where its logits are
    int32_t sequence;          // whose it is
    int32_t parent;            // row above it in its tree; -1: none
    int32_t token;             // drafted there
    int32_t on_host;           // not 0: the host chooses
};

// Rows that follow one another.
struct Span {
    int32_t first;
    int32_t n;
};

// Mirrored by `VerifyArgs` in src/gpu/kernels.rs.
struct Verify {
    const float *logits;  // [.., n_vocab]
    const RowRule *rules; // [n_rows]
    const Span *spans;    // each sequence's rows, its root first
    int32_t *chosen;      // [n_rows]; -1 where the host chooses
    int32_t *last;        // by sequence: logits row of the last accepted row; of the root where the host chooses
    int32_t *roots;       // by sequence: the token chosen there; 0 where the host chooses
    uint32_t *n_done;     // by sequence: rows that are done; zeros, before and after
    int32_t n_vocab;
    int32_t padding;
};

// Philox4x32-10: see src/engine/sampler.rs.
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

// Behind this distance from the largest logit, tokens weigh nothing in top-p: as in src/vector.rs.
constexpr float NEGLIGIBLE = 32.0f;

__device__ inline unsigned long long mass(float below_max) {
    return below_max > -NEGLIGIBLE ? fixed(expf(below_max)) : 0;
}

__device__ inline unsigned long long tempered(const RowRule &rule, float below_max) {
    return fixed(expf(below_max * rule.inverse_temperature));
}

// The share of a sum, and at least the smallest number.
__device__ inline unsigned long long share_of(double share, unsigned long long sum) {
    const unsigned long long part = static_cast<unsigned long long>(share * static_cast<double>(sum));
    return part > 0 ? part : 1;
}

// Where a uniform number points to in a sum.
__device__ inline unsigned long long target_in(const RowRule &rule, unsigned long long sum) {
    const unsigned long long target = static_cast<unsigned long long>(uniform(rule) * static_cast<double>(sum));
    return target < sum ? target : sum - 1;
}

// Distances from the largest logit within which tokens are collected.
constexpr int N_REACHES = 6;

// Chooses a distance and collects what is within it, if that fits the list and holds all that the filters may keep; returns
// whether it does. `all` gets the mass of the row, where top-p is of that.
__device__ inline bool collect_enough(const RowRule &rule, const float *row, int n, float max, List &list,
                                      unsigned long long *all) {
    // The last one is min-p's own; none that is wider holds more that counts.
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
        if (count <= LIST && count > n_within) {
            n_within = count;
            reach = reaches[r];
        }
    }
    if (n_within == 0) {
        return false;
    }
    collect(row, n, ranked(max - reach, n) & ~0xffffffffull, list);
    if (n_within != list.n) {
        return false; // rounding put a value on the other side of the edge
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

// Draws from a list that holds all that the filters may keep. `sorted` has room for LIST ranks.
__device__ inline int draw_from_list(const RowRule &rule, const List &list, float max, unsigned long long all,
                                     unsigned long long *sorted) {
    __shared__ unsigned long long weights[LIST];
    __shared__ int n_kept, drawn;
    constexpr int EACH = LIST / SELECT_THREADS;
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
            before += place_of(sorted[j]) < place_of(sorted[i]) ? weights[j] : 0;
        }
        if (before <= target && target - before < weights[i]) {
            drawn = place_of(sorted[i]);
        }
    }
    __syncthreads();
    return drawn;
}

// The lowest rank of the smallest set of best values, of rank `floor` at least, that weigh `enough` together; `floor` if all
// of them weigh less.
template <class Weight>
__device__ inline unsigned long long threshold(const float *row, int n, unsigned long long floor, unsigned long long best,
                                               unsigned long long enough, Weight weight) {
    unsigned long long low = floor, high = best + 1; // those from `low` on weigh enough, those from `high` on do not
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
            break; // whatever is between, it is one value
        }
        if (sum >= enough) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return low;
}

// Draws from a whole row: where the filters leave more than a list holds.
__device__ inline int draw_from_row(const RowRule &rule, const float *row, int n, unsigned long long best) {
    __shared__ int drawn;
    const float max = value_of(best);
    unsigned long long least = 1ull << 32; // no NaN
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
    // Each thread adds up a run of tokens; the one whose run the number points into looks for the token.
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

// Walks down a sequence's tree by what was chosen at each row. For one warp.
__device__ inline void walk(const Verify &v, int sequence) {
    const volatile int32_t *chosen = v.chosen; // other blocks wrote it
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

// Blocks: (rows). The last block of a sequence to be done walks down its tree.
KERNEL __launch_bounds__(SELECT_THREADS, 2) verify(Verify v) {
    __shared__ List list;
    __shared__ unsigned long long sorted[LIST];
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
        token = place_of(best);
        const float max = value_of(best);
        if (rule.inverse_temperature > 0.0f && max - max == 0.0f) { // finite
            unsigned long long all;
            token = collect_enough(rule, row, v.n_vocab, max, list, &all)
                        ? draw_from_list(rule, list, max, all, sorted)
                        : draw_from_row(rule, row, v.n_vocab, best);
        }
    }
    if (threadIdx.x == 0) {
        v.chosen[blockIdx.x] = token;
        __threadfence();
        is_last = atomicAdd(&v.n_done[rule.sequence], 1u) + 1 == static_cast<uint32_t>(v.spans[rule.sequence].n);
        __threadfence();
    }
    __syncthreads();
    if (is_last && warp_id() == 0) {
        walk(v, rule.sequence);
    }
}
EMULATED(verify)
