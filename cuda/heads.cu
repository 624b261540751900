// Products of head matrices with a few rows: y = finish(W x + b).
//
// Time is what it takes to read W once, so a block reads each of its matrix rows once for up to COLUMNS rows of x, which wait
// in shared memory. A warp owns MATRIX_ROWS rows of W; its lanes divide each row among them in vectors of 16 bytes.
// More rows of x than COLUMNS take another column of blocks, whose reads of W come from the L2 cache.

#include "common.cuh"

// What becomes of a sum. The same numbers stand in src/gpu/kernels.rs.
enum Finish : int32_t {
    PLAIN = 0,         // y = s
    SILU = 1,          // y = silu(s)
    SILU_RESIDUAL = 2, // y = r + silu(s)
    RESIDUAL = 3,      // y = r + s
};

// A product of `n_nets` matrices. Mirrored by `ProductArgs` in src/gpu/kernels.rs.
struct Product {
    const void *weights;      // [n_nets, n_out, stride]: F16, or 8-bit whole numbers
    const uint16_t *scales;   // of 8 bits, F16: [n_nets, n_out, stride / 32]
    const float *bias;        // [n_nets, n_out], or null
    const float *x;           // rows of n_x values
    const int32_t *x_rows;    // which of them each row is; null: its own number
    const uint16_t *table;    // F16 rows of n_table values that stand behind x's, or null
    const int32_t *tokens;    // which of them
    const float *residual;    // rows of n_out values, where `finish` asks for it
    const int32_t *residual_rows;
    float *y;                 // [n_nets, n_rows, n_out]
    int64_t x_net;            // values from one net's x to the next; 0: all read the same
    int64_t residual_net;
    int32_t n_rows;
    int32_t n_out;
    int32_t n_x;
    int32_t n_table;
    int32_t stride;           // values from one row of W to the next, zeros behind n_x + n_table
    int32_t finish;
    int32_t n_x_rows;         // rows that the indices may name; others are brought into range
    int32_t n_table_rows;
    int32_t n_residual_rows;
    int32_t padding;
};

// An index brought into range: a wrong one gives a wrong value, never a wrong address.
__device__ inline int64_t within(int32_t index, int32_t n) { return max(0, min(index, n - 1)); }

constexpr int PRODUCT_THREADS = 256;
constexpr int MATRIX_ROWS = 4;
// Values of x in shared memory: 32 KiB.
constexpr int STAGED = 8192;

// Eight F16 numbers a lane.
struct HalfWeights {
    static constexpr int PER_LANE = 8;
    uint4 bits;

    __device__ void load(const Product &p, int64_t row, int k) {
        bits = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(p.weights) + row * p.stride + k);
    }
    __device__ void four(int quarter, float out[4]) const {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = words[quarter * 2 + i / 2];
            out[i] = half_bits_to_float(static_cast<uint16_t>(i % 2 ? word >> 16 : word & 0xffff));
        }
    }
};

// Sixteen whole numbers of 8 bits a lane, half a block of 32 that shares a scale.
struct ByteWeights {
    static constexpr int PER_LANE = 16;
    uint4 bits;
    float scale;

    __device__ void load(const Product &p, int64_t row, int k) {
        bits = *reinterpret_cast<const uint4 *>(static_cast<const int8_t *>(p.weights) + row * p.stride + k);
        scale = half_bits_to_float(p.scales[row * (p.stride / 32) + k / 32]);
    }
    __device__ void four(int quarter, float out[4]) const {
        const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[i] = scale * static_cast<float>(static_cast<int8_t>(words[quarter] >> (8 * i)));
        }
    }
};

// Where value k of a row waits in shared memory: lanes that read their next four values read one run of 512 bytes.
template <int PER_LANE> __device__ inline int staged_at(int k) {
    const int group = k / (WARP * PER_LANE), in_group = k % (WARP * PER_LANE);
    const int lane = in_group / PER_LANE, i = in_group % PER_LANE;
    return group * WARP * PER_LANE + i / 4 * (4 * WARP) + lane * 4 + i % 4;
}

// Value k of a row of x, or of what stands behind it.
__device__ inline float input_value(const Product &p, const float *x, int row, int k) {
    if (k < p.n_x) {
        return x[within(p.x_rows ? p.x_rows[row] : row, p.n_x_rows) * p.n_x + k];
    }
    if (k < p.n_x + p.n_table) {
        return half_bits_to_float(p.table[within(p.tokens[row], p.n_table_rows) * p.n_table + k - p.n_x]);
    }
    return 0.0f;
}

__device__ inline float finished(const Product &p, float sum, int net, int row, int out) {
    if (p.bias) {
        sum += p.bias[static_cast<int64_t>(net) * p.n_out + out];
    }
    if (p.finish == SILU || p.finish == SILU_RESIDUAL) {
        sum = sum / (1.0f + expf(-sum));
    }
    if (p.finish == RESIDUAL || p.finish == SILU_RESIDUAL) {
        const int64_t from = within(p.residual_rows ? p.residual_rows[row] : row, p.n_residual_rows);
        sum += p.residual[net * p.residual_net + from * p.n_out + out];
    }
    return sum;
}

// Blocks: (rows of x / COLUMNS, rows of W / 32, nets).
template <class Weights, int COLUMNS> __device__ inline void product(const Product &p) {
    constexpr int PER_LANE = Weights::PER_LANE, PER_WARP = WARP * PER_LANE, CHUNK = STAGED / COLUMNS;
    static_assert(CHUNK % PER_WARP == 0, "a chunk is whole reads of a warp");
    static_assert(MATRIX_ROWS * COLUMNS <= WARP, "each lane writes at most one value");
    DYNAMIC_SHARED(float, staged); // [COLUMNS, CHUNK]

    const int net = blockIdx.z, first_row = blockIdx.x * COLUMNS;
    const int first_out = (blockIdx.y * (PRODUCT_THREADS / WARP) + warp_id()) * MATRIX_ROWS;
    const float *x = p.x + net * p.x_net;

    float sums[MATRIX_ROWS][COLUMNS] = {};
    for (int base = 0; base < p.stride; base += CHUNK) {
        const int n = min(CHUNK, (p.stride - base + PER_WARP - 1) / PER_WARP * PER_WARP);
        __syncthreads(); // nobody reads the chunk before any more
        for (int column = 0; column < COLUMNS; ++column) {
            const int row = first_row + column;
            for (int k = threadIdx.x; k < n; k += PRODUCT_THREADS) {
                const float value = row < p.n_rows ? input_value(p, x, row, base + k) : 0.0f;
                staged[column * CHUNK + staged_at<PER_LANE>(k)] = value;
            }
        }
        __syncthreads();
        if (first_out < p.n_out) {
#pragma unroll 2
            for (int at = 0; at < n; at += PER_WARP) {
                const int k = base + at + lane_id() * PER_LANE;
                if (k >= p.stride) {
                    continue; // the row's last read has nothing for this lane
                }
                Weights weights[MATRIX_ROWS];
#pragma unroll
                for (int r = 0; r < MATRIX_ROWS; ++r) {
                    // Rows beyond the last one are read as the last one, and not written.
                    const int out = min(first_out + r, p.n_out - 1);
                    weights[r].load(p, static_cast<int64_t>(net) * p.n_out + out, k);
                }
#pragma unroll
                for (int quarter = 0; quarter < PER_LANE / 4; ++quarter) {
                    float w[MATRIX_ROWS][4];
#pragma unroll
                    for (int r = 0; r < MATRIX_ROWS; ++r) {
                        weights[r].four(quarter, w[r]);
                    }
#pragma unroll
                    for (int column = 0; column < COLUMNS; ++column) {
                        const float4 v = *reinterpret_cast<const float4 *>(
                            &staged[column * CHUNK + at + quarter * (4 * WARP) + lane_id() * 4]);
#pragma unroll
                        for (int r = 0; r < MATRIX_ROWS; ++r) {
                            sums[r][column] += w[r][0] * v.x + w[r][1] * v.y + w[r][2] * v.z + w[r][3] * v.w;
                        }
                    }
                }
            }
        }
    }

    float mine = 0.0f;
#pragma unroll
    for (int r = 0; r < MATRIX_ROWS; ++r) {
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            const float sum = warp_reduce(sums[r][column], Sum());
            mine = lane_id() == r * COLUMNS + column ? sum : mine;
        }
    }
    const int out = first_out + lane_id() / COLUMNS, row = first_row + lane_id() % COLUMNS;
    if (lane_id() < MATRIX_ROWS * COLUMNS && out < p.n_out && row < p.n_rows) {
        p.y[(static_cast<int64_t>(net) * p.n_rows + row) * p.n_out + out] = finished(p, mine, net, row, out);
    }
}

// With 8 columns the sums alone take 32 registers of a thread, so only one block of it must fit a multiprocessor.
#define PRODUCT_KERNEL(name, weights, columns)                                                                           \
    KERNEL __launch_bounds__(PRODUCT_THREADS, columns == 8 ? 1 : 2) name(Product p) { product<weights, columns>(p); } \
    EMULATED(name)

PRODUCT_KERNEL(product_f16_1, HalfWeights, 1)
PRODUCT_KERNEL(product_f16_2, HalfWeights, 2)
PRODUCT_KERNEL(product_f16_4, HalfWeights, 4)
PRODUCT_KERNEL(product_f16_8, HalfWeights, 8)
PRODUCT_KERNEL(product_q8_1, ByteWeights, 1)
PRODUCT_KERNEL(product_q8_2, ByteWeights, 2)
PRODUCT_KERNEL(product_q8_4, ByteWeights, 4)
PRODUCT_KERNEL(product_q8_8, ByteWeights, 8)
