// Products of head matrices with few rows: y = finish(W x + b), for one or several matrices of the same shape.
//
// Shapes are in args.h, ProductArgs. Launch: blocks (ceil(n_rows / COLUMNS), ceil(n_out / PRODUCT_ROWS), n_nets) of
// PRODUCT_THREADS threads, PRODUCT_SHARED_BYTES of dynamic shared memory. F16 rows of W are padded to 8 values, 8-bit rows to
// 32: a lane reads 16 aligned bytes.
//
// With few rows the time is that of reading W from memory once, so a block reads each of its rows of W once for up to COLUMNS
// rows of x, which it keeps in shared memory. A warp owns MATRIX_ROWS rows of W, and its lanes divide each row among them.
// More rows of x than COLUMNS take further blocks along x, whose reads of W hit the L2 cache.
//
// Never stored: the dequantized W, the concatenation [x, table row], and the sums before `finish`. They live in registers and
// shared memory only.

#include "common.cuh"

// A clamped index: a wrong one reads a wrong value, never a wrong address.
__device__ inline int64_t within(int32_t index, int32_t n) { return max(0, min(index, n - 1)); }

// Rows of W per warp: each value of x read from shared memory is used for this many products.
constexpr int MATRIX_ROWS = 4;
// Values of x in shared memory.
constexpr int STAGED = PRODUCT_SHARED_BYTES / sizeof(float);
static_assert(PRODUCT_ROWS == PRODUCT_THREADS / WARP * MATRIX_ROWS, "the host sizes the grid by PRODUCT_ROWS");

// Eight F16 values per lane: one read of 16 bytes.
struct HalfWeights {
    static constexpr int PER_LANE = 8;
    uint4 bits;

    __device__ void load(const ProductArgs &p, int64_t row, int k) {
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

// Sixteen 8-bit integers per lane: one read of 16 bytes, half of a block of 32 that shares a scale.
struct ByteWeights {
    static constexpr int PER_LANE = 16;
    uint4 bits;
    float scale;

    __device__ void load(const ProductArgs &p, int64_t row, int k) {
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

// Index in shared memory of value k of a row. Lanes read four values at a time; this order makes those of a warp 512
// consecutive bytes, without bank conflicts, although each lane multiplies PER_LANE consecutive values of W.
template <int PER_LANE> __device__ inline int staged_at(int k) {
    const int group = k / (WARP * PER_LANE), in_group = k % (WARP * PER_LANE);
    const int lane = in_group / PER_LANE, i = in_group % PER_LANE;
    return group * WARP * PER_LANE + i / 4 * (4 * WARP) + lane * 4 + i % 4;
}

// Value k of the row [x, table row, zeros].
__device__ inline float input_value(const ProductArgs &p, const float *x, int row, int k) {
    if (k < p.n_x) {
        return x[within(p.x_rows ? p.x_rows[row] : row, p.n_x_rows) * p.n_x + k];
    }
    if (k < p.n_x + p.n_table) {
        return half_bits_to_float(p.table[within(p.tokens[row], p.n_table_rows) * p.n_table + k - p.n_x]);
    }
    return 0.0f;
}

// The result for one element of y, from its sum.
__device__ inline float finished(const ProductArgs &p, float sum, int net, int row, int out) {
    if (p.bias) {
        sum += p.bias[static_cast<int64_t>(net) * p.n_out + out];
    }
    if (p.finish == Finish::Silu || p.finish == Finish::SiluResidual) {
        sum = sum / (1.0f + expf(-sum));
    }
    if (p.finish == Finish::Residual || p.finish == Finish::SiluResidual) {
        const int64_t from = within(p.residual_rows ? p.residual_rows[row] : row, p.n_residual_rows);
        sum += p.residual[net * p.residual_net + from * p.n_out + out];
    }
    return sum;
}

// One block: COLUMNS rows of x, PRODUCT_ROWS rows of W, one net. The loop with the barriers runs equally often in
// all threads; a warp without rows of W only helps to load x.
template <class Weights, int COLUMNS> __device__ inline void product(const ProductArgs &p) {
    constexpr int PER_LANE = Weights::PER_LANE, PER_WARP = WARP * PER_LANE, CHUNK = STAGED / COLUMNS;
    static_assert(CHUNK % PER_WARP == 0, "a chunk is whole reads of a warp");
    static_assert(MATRIX_ROWS * COLUMNS <= WARP, "a lane writes at most one value of y");
    DYNAMIC_SHARED(float, staged); // [COLUMNS, CHUNK]

    const int net = blockIdx.z, first_row = blockIdx.x * COLUMNS;
    const int first_out = (blockIdx.y * (PRODUCT_THREADS / WARP) + warp_id()) * MATRIX_ROWS;
    const float *x = p.x + net * p.x_net;

    float sums[MATRIX_ROWS][COLUMNS] = {};
    for (int base = 0; base < p.stride; base += CHUNK) {
        const int n = min(CHUNK, (p.stride - base + PER_WARP - 1) / PER_WARP * PER_WARP);
        __syncthreads(); // all warps have read the previous chunk
        for (int column = 0; column < COLUMNS; ++column) {
            const int row = first_row + column;
            for (int k = threadIdx.x; k < n; k += PRODUCT_THREADS) {
                const float value = row < p.n_rows ? input_value(p, x, row, base + k) : 0.0f;
                staged[column * CHUNK + staged_at<PER_LANE>(k)] = value;
            }
        }
        __syncthreads(); // the chunk is complete
        if (first_out < p.n_out) {
#pragma unroll 2
            for (int at = 0; at < n; at += PER_WARP) {
                const int k = base + at + lane_id() * PER_LANE;
                if (k >= p.stride) {
                    continue; // past the end of the row: the last read of a warp may be partial
                }
                Weights weights[MATRIX_ROWS];
#pragma unroll
                for (int r = 0; r < MATRIX_ROWS; ++r) {
                    // Past the last row of W the last one is read again, without a branch, and never written.
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

    // Lane r * COLUMNS + column keeps the sum of row r and that column, so that the warp writes y in one go.
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

// One kernel for each type of W and each number of columns. With 8 columns the sums alone take 32 registers per thread, so one
// block per multiprocessor must do; with fewer, two blocks hide each other's barriers.
#define PRODUCT_KERNEL(name, weights, columns)                                                                           \
    KERNEL __launch_bounds__(PRODUCT_THREADS, columns == 8 ? 1 : 2) name(ProductArgs p) { product<weights, columns>(p); } \
    EMULATED(name)

PRODUCT_KERNEL(product_f16_1, HalfWeights, 1)
PRODUCT_KERNEL(product_f16_2, HalfWeights, 2)
PRODUCT_KERNEL(product_f16_4, HalfWeights, 4)
PRODUCT_KERNEL(product_f16_8, HalfWeights, 8)
PRODUCT_KERNEL(product_q8_1, ByteWeights, 1)
PRODUCT_KERNEL(product_q8_2, ByteWeights, 2)
PRODUCT_KERNEL(product_q8_4, ByteWeights, 4)
PRODUCT_KERNEL(product_q8_8, ByteWeights, 8)
