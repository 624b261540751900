// The ABI between the kernels and src/gpu/kernels.rs: the argument struct of each kernel, and the sizes both sides
// must agree on. nvcc, the C++ compiler of the CPU emulation and bindgen (in build.rs) all read this file, so the Rust
// side has no copy to keep in step; the assertions at the end hold in all three.
//
// A kernel takes one struct by value: cuLaunchKernel copies it to constant memory, where all threads read it in one
// broadcast. Pointers come first and 4-byte numbers last, so that no struct has padding between its fields. Shapes are
// given row by row, outermost first.
#pragma once

#include <stddef.h>
#include <stdint.h>

constexpr int PRODUCT_THREADS = 256;           ///< Threads of a block of `product_*`: 8 warps.
constexpr int PRODUCT_ROWS = 32;               ///< Rows of W that such a block multiplies with: 4 per warp.
constexpr int PRODUCT_SHARED_BYTES = 32 << 10; ///< Dynamic shared memory of such a block; 48 KiB need no opt-in.
constexpr int SELECT_THREADS = 512;            ///< Threads of a block of `top_k`, `choose_paths` and `verify`.
constexpr int MAX_CANDIDATES = 1024;           ///< Candidates of a row that are sorted in shared memory: 8 KiB of ranks.
constexpr int MAX_K = 64;                      ///< Most tokens per row of `top_k`; see `least_of_best`.
constexpr int N_BINS = 12;                     ///< Ranges of a head's probability that are calibrated separately.

/// What a product does with its sum `s`, after the bias was added; `r` is the residual.
enum class Finish : int32_t {
    Plain = 0,        ///< `s`
    Silu = 1,         ///< `silu(s)`
    SiluResidual = 2, ///< `r + silu(s)`
    Residual = 3,     ///< `r + s`
};

/// `product_*`: y = finish(W [x, table row] + bias), for each of n_nets matrices.
struct ProductArgs {
    const void *weights;          ///< [n_nets, n_out, stride]: F16, or 8-bit integers
    const uint16_t *scales;       ///< F16 [n_nets, n_out, stride / 32], for 8-bit weights only
    const float *bias;            ///< [n_nets, n_out], or null
    const float *x;               ///< [n_x_rows, n_x], for each net where x_net > 0
    const int32_t *x_rows;        ///< [n_rows]: the row of x for each row; null: its own index
    const uint16_t *table;        ///< F16 [n_table_rows, n_table]: embeddings appended to the rows of x, or null
    const int32_t *tokens;        ///< [n_rows]: the row of the table for each row
    const float *residual;        ///< [n_residual_rows, n_out], where `finish` reads it
    const int32_t *residual_rows; ///< [n_rows]: the row of the residual for each row; null: its own index
    float *y;                     ///< [n_nets, n_rows, n_out]
    int64_t x_net;                ///< values from one net's x to the next; 0: all nets read the same
    int64_t residual_net;         ///< the same for the residual
    int32_t n_rows;
    int32_t n_out;
    int32_t n_x;
    int32_t n_table;
    int32_t stride;               ///< values from one row of W to the next: n_x + n_table, padded with zeros
    Finish finish;
    int32_t n_x_rows;             ///< bounds of the indices, which are clamped to them
    int32_t n_table_rows;
    int32_t n_residual_rows;
};

/// `top_k`
struct TopKArgs {
    const float *logits;      ///< [n_rows, n]
    const int32_t *token_map; ///< [n]: the token of each column; null: the column's index
    int32_t *tokens;          ///< [n_rows, k], best first; of equal logits the lowest column first
    float *p;                 ///< [n_rows, k]: softmax over the whole row
    int32_t n;
    int32_t k;                ///< at most n, and MAX_K
};

/// `choose_paths`
struct ChoosePathsArgs {
    const float *p;            ///< [n_paths, k]: the head's probability of each candidate, best first
    const int32_t *candidates; ///< [n_paths, k]: their tokens
    const float *path_q;       ///< [n_paths]: probability that the path is accepted
    const int32_t *origins;    ///< [n_paths]: index of the path's sequence
    const float *trust;        ///< [n_origins]: factor of each sequence
    const float *ratios;       ///< [N_BINS]: measured acceptance over the head's probability
    float *next_q;             ///< [n_next]
    int32_t *next_origins;     ///< [n_next]
    int32_t *next_parents;     ///< [n_next]: the path that each continues
    int32_t *next_tokens;      ///< [n_next]: the token it continues with
    float lowest;              ///< lower end of the first range of probability
    float highest;             ///< upper clamp for calibrated probabilities
    int32_t n_paths;
    int32_t k;
    int32_t n_next;            ///< at most n_paths * k, which is at most MAX_CANDIDATES
    int32_t n_origins;
};

/// How `verify` chooses the token after a row, and where the row is in its tree.
struct RowRule {
    uint32_t seed[2];          ///< Low and high half.
    uint32_t position[2];      ///< Of the token to choose, in its sequence; low and high half.
    float inverse_temperature; ///< 0: the largest logit.
    float top_p;               ///< 1: off.
    float min_logit;           ///< `ln(min_p)`, relative to the largest logit; negative infinity: off.
    int32_t top_k;             ///< 0: off.
    int32_t logits_row;        ///< Index of its row of logits.
    int32_t sequence;          ///< Index of its sequence.
    int32_t parent;            ///< Index of its parent's row; -1 for a root.
    int32_t token;             ///< The token drafted there.
    int32_t on_host;           ///< Not 0: the host chooses.
};

/// The consecutive rows of one sequence, its root first.
struct Span {
    int32_t first; ///< The root's row.
    int32_t n;     ///< Number of rows.
};

/// `verify`
struct VerifyArgs {
    const float *logits;  ///< [.., n_vocab]
    const RowRule *rules; ///< [n_rows]
    const Span *spans;    ///< [n_sequences]
    int32_t *chosen;      ///< [n_rows]: the token chosen; -1 where the host chooses
    int32_t *last;        ///< [n_sequences]: logits row of the last accepted row; of the root if the host chooses on the way
    int32_t *roots;       ///< [n_sequences]: the token chosen there; 0 where the host chooses
    uint32_t *n_done;     ///< [n_sequences]: finished rows; zeros before and after a launch
    int32_t n_vocab;
};

static_assert(sizeof(void *) == 8 && sizeof(Finish) == 4, "64-bit addresses on both sides");
static_assert(offsetof(ProductArgs, x_net) == 80 && offsetof(ProductArgs, finish) == 116 && sizeof(ProductArgs) == 136,
              "layout of ProductArgs");
static_assert(offsetof(TopKArgs, n) == 32 && sizeof(TopKArgs) == 40, "layout of TopKArgs");
static_assert(offsetof(ChoosePathsArgs, lowest) == 80 && sizeof(ChoosePathsArgs) == 104, "layout of ChoosePathsArgs");
static_assert(offsetof(RowRule, logits_row) == 32 && sizeof(RowRule) == 52, "RowRule has no padding: it is copied as bytes");
static_assert(sizeof(Span) == 8, "Span has no padding: it is copied as bytes");
static_assert(offsetof(VerifyArgs, n_vocab) == 56 && sizeof(VerifyArgs) == 64, "layout of VerifyArgs");
