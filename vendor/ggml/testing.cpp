// The kernels of few-rows.cpp and attention.cpp as tests call them: tests/cpu_kernels declares
// the structs and functions below and compares results with plain loops. benches/cpu_kernels.rs
// times them.
//
// build.rs compiles this file once without KERNELS, for operations in a graph of ggml's (which
// shows that the patches call the kernels), and once for each set of instructions that the CPU
// has: KERNELS names it, and the file contains the kernels and calls them by themselves.

#ifdef KERNELS
#define CONCAT_(a, b) a##_##b
#define CONCAT(a, b) CONCAT_(a, b)
#define NAME(function) CONCAT(function, KERNELS)
// ggml-cpu's own symbols are linked too.
#define ggml_few_rows_repacks NAME(few_rows_repacks)
#define ggml_few_rows_work_size NAME(few_rows_work_size)
#define ggml_few_rows_mul_mat NAME(few_rows_mul_mat)
#define ggml_few_rows_repack NAME(few_rows_repack)
#define ggml_attention_by_kv_head NAME(attention_by_kv_head)
#define ggml_attention_work_size NAME(attention_work_size)
#define ggml_barrier NAME(barrier)
#define ggml_threadpool_chunk_set NAME(chunk_set)
#define ggml_threadpool_chunk_add NAME(chunk_add)
#include "attention.cpp"
#include "few-rows.cpp"
#else
#define NAME(function) function##_graph
#endif

#include "ggml-backend.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "repack.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#ifdef KERNELS
// What the kernels need of ggml's pool.
struct ggml_threadpool {
    explicit ggml_threadpool(int n) : n(n) {}

    const int n;
    int waiting = 0, round = 0;
    std::mutex mutex;
    std::condition_variable all_here;
    std::atomic<int> chunk{0};
};

void ggml_barrier(ggml_threadpool* pool) {
    std::unique_lock<std::mutex> lock(pool->mutex);
    const int round = pool->round;
    if (++pool->waiting == pool->n) {
        pool->waiting = 0;
        pool->round++;
        pool->all_here.notify_all();
    } else {
        pool->all_here.wait(lock, [&] { return pool->round != round; });
    }
}

void ggml_threadpool_chunk_set(ggml_threadpool* pool, int value) { pool->chunk = value; }

int ggml_threadpool_chunk_add(ggml_threadpool* pool, int value) {
    return pool->chunk.fetch_add(value);
}
#endif

namespace {

constexpr size_t N_TENSOR_BYTES = 1 << 20; // tensors' headers and a graph

struct Context {
    ggml_context* const ggml = ggml_init({N_TENSOR_BYTES, nullptr, true});
    Context() {
        ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
    }
    ~Context() { ggml_free(ggml); }

    // A tensor of the caller's memory.
    ggml_tensor* tensor(ggml_type type, int64_t n0, int64_t n1, int64_t n2, int64_t n3,
                        const void* data) {
        ggml_tensor* t = ggml_new_tensor_4d(ggml, type, n0, n1, n2, n3);
        t->data = const_cast<void*>(data);
        return t;
    }
};

#ifdef KERNELS
// Runs `kernel` on each of n threads with a work buffer of `work_size` bytes, all of them 0xFF.
template <typename Kernel>
bool run(ggml_tensor* op, int n_threads, size_t work_size, Kernel kernel) {
    std::vector<char> work(work_size, (char)0xFF);
    ggml_threadpool pool(n_threads);
    std::atomic<int> n_done{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < n_threads; i++) {
        threads.emplace_back([&, i] {
            const ggml_compute_params params = {i, n_threads, work_size, work.data(), &pool, false};
            n_done += kernel(&params, op);
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    return n_done == n_threads;
}
#else
bool run(Context& context, ggml_tensor* op, int n_threads) {
    ggml_cgraph* graph = ggml_new_graph(context.ggml);
    ggml_build_forward_expand(graph, op);
    ggml_cplan plan = ggml_graph_plan(graph, n_threads, nullptr);
    std::vector<uint8_t> work(plan.work_size, 0xFF);
    plan.work_data = work.data();
    return ggml_graph_compute(graph, &plan) == GGML_STATUS_SUCCESS;
}
#endif

} // namespace

extern "C" {

// out[row][col] = sum over k of weights[col][k] * x[row][k]
struct MulMat {
    int32_t type; // a ggml_type, of weights
    int32_t repacked;
    int32_t n_threads;
    int64_t k, cols, rows;
    const void* weights; // [cols][k]
    const float* x;      // [rows][k]
    float* out;          // [rows][cols]
};

// Returns whether there is a kernel for it.
bool NAME(mul_mat)(const MulMat* m) {
    Context context;
    ggml_tensor* weights = ggml_new_tensor_2d(context.ggml, (ggml_type)m->type, m->k, m->cols);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(
        context.ggml,
        m->repacked ? ggml_backend_cpu_repack_buffer_type() : ggml_backend_cpu_buffer_type());
    ggml_backend_tensor_set(weights, m->weights, 0, ggml_nbytes(weights));
    ggml_tensor* op = ggml_mul_mat(context.ggml, weights,
                                   context.tensor(GGML_TYPE_F32, m->k, m->rows, 1, 1, m->x));
    op->data = m->out;
#ifdef KERNELS
    const bool repacked = m->repacked;
    const size_t work_size = ggml_few_rows_work_size(op, repacked);
    const bool done =
        work_size > 0 && run(op, m->n_threads, work_size,
                             [=](const ggml_compute_params* params, ggml_tensor* tensor) {
                                 return ggml_few_rows_mul_mat(params, tensor, repacked);
                             });
#else
    const bool done = run(context, op, m->n_threads);
#endif
    ggml_backend_buffer_free(buffer);
    return done;
}

#ifdef KERNELS
// Products of 8-bit numbers in a second, by n threads that do nothing but multiply; 0 if these
// kernels have no such instruction.
double NAME(peak_products)(int n_threads) {
#if defined(__AVX2__)
#if defined(FEW_ROWS_LANES16)
    using Vector = __m512i;
    const Vector ones = _mm512_set1_epi8(1);
    const auto step = [ones](Vector v) { return _mm512_dpbusd_epi32(v, ones, ones); };
#else
    using Vector = __m256i;
    const Vector ones = _mm256_set1_epi8(1);
    const auto step = [ones](Vector v) { return _mm256_maddubs_epi16(v, ones); };
#endif
    constexpr int N = 1 << 24;
    const auto multiply = [=] {
        Vector a = ones, b = ones, c = ones, d = ones, e = ones, f = ones, g = ones, h = ones;
        for (int i = 0; i < N; i++) {
            a = step(a), b = step(b), c = step(c), d = step(d);
            e = step(e), f = step(f), g = step(g), h = step(h);
            // For all the compiler knows, they are used.
            asm volatile(""
                         : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h));
        }
    };
    std::vector<std::thread> threads;
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < n_threads; i++) {
        threads.emplace_back(multiply);
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    return n_threads * 8.0 * N * sizeof(Vector) / took.count();
#else
    (void)n_threads;
    return 0;
#endif
}
#else
// Multiplies `n` times with each of `n_copies` of the weights in turn, so that they need not be in
// a cache, and writes the seconds of each multiplication to `seconds`. `reference`: by ggml's own
// kernels where ours take the file's layout. Returns whether all went well.
bool time_mul_mat(const MulMat* m, int n_copies, int n, bool reference, double* seconds) {
    Context context;
    std::vector<ggml_tensor*> weights;
    for (int i = 0; i < n_copies; i++) {
        weights.push_back(ggml_new_tensor_2d(context.ggml, (ggml_type)m->type, m->k, m->cols));
    }
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(
        context.ggml,
        m->repacked ? ggml_backend_cpu_repack_buffer_type() : ggml_backend_cpu_buffer_type());
    std::vector<ggml_cgraph*> graphs;
    std::vector<uint8_t> work;
    ggml_threadpool_params params = ggml_threadpool_params_default(m->n_threads);
    ggml_threadpool* pool = ggml_threadpool_new(&params);
    std::vector<ggml_cplan> plans;
    ggml_tensor* x = context.tensor(GGML_TYPE_F32, m->k, m->rows, 1, 1, m->x);
    for (ggml_tensor* w : weights) {
        ggml_backend_tensor_set(w, m->weights, 0, ggml_nbytes(w));
        ggml_tensor* op = ggml_mul_mat(context.ggml, w, x);
        op->data = m->out;
        graphs.push_back(ggml_new_graph_custom(context.ggml, 8, false));
        ggml_build_forward_expand(graphs.back(), op);
        plans.push_back(ggml_graph_plan(graphs.back(), m->n_threads, pool));
        plans.back().use_ref = reference;
        work.resize(std::max(work.size(), plans.back().work_size));
    }
    bool done = true;
    for (int run = 0; run < n; run++) {
        ggml_cplan& plan = plans[run % n_copies];
        plan.work_data = work.data();
        const auto start = std::chrono::steady_clock::now();
        done = done && ggml_graph_compute(graphs[run % n_copies], &plan) == GGML_STATUS_SUCCESS;
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        seconds[run] = took.count();
    }
    ggml_threadpool_free(pool);
    ggml_backend_buffer_free(buffer);
    return done;
}
#endif

// Attention over a cache whose cells hold all KV heads, as llama.cpp's does.
struct Attention {
    int32_t kv_type; // a ggml_type
    int32_t n_threads;
    int64_t dk, dv, n_q, n_cells, n_head, n_kv_head, n_streams;
    float scale, max_bias, softcap;
    const float* q;       // [n_streams][n_q][n_head][dk]
    const void* k;        // [n_streams][n_cells][n_kv_head][dk]
    const void* v;        // [n_streams][n_cells][n_kv_head][dv]
    const uint16_t* mask; // [n_streams][n_q][n_cells], F16, or null
    const float* sinks;   // [n_head], or null
    float* out;           // [n_streams][n_q][n_head][dv]
};

// Returns whether there is a kernel for it.
bool NAME(attention)(const Attention* a) {
    Context context;
    const ggml_type type = (ggml_type)a->kv_type;
    const auto heads_last = [&](ggml_tensor* t) {
        return ggml_permute(context.ggml, t, 0, 2, 1, 3);
    };
    ggml_tensor* q =
        heads_last(context.tensor(GGML_TYPE_F32, a->dk, a->n_head, a->n_q, a->n_streams, a->q));
    ggml_tensor* k =
        heads_last(context.tensor(type, a->dk, a->n_kv_head, a->n_cells, a->n_streams, a->k));
    ggml_tensor* v =
        heads_last(context.tensor(type, a->dv, a->n_kv_head, a->n_cells, a->n_streams, a->v));
    ggml_tensor* mask =
        a->mask ? context.tensor(GGML_TYPE_F16, a->n_cells, a->n_q, 1, a->n_streams, a->mask)
                : nullptr;
    ggml_tensor* op =
        ggml_flash_attn_ext(context.ggml, q, k, v, mask, a->scale, a->max_bias, a->softcap);
    ggml_prec_set_acc(op, GGML_PREC_F32);
    if (a->sinks) {
        ggml_flash_attn_ext_add_sinks(op,
                                      context.tensor(GGML_TYPE_F32, a->n_head, 1, 1, 1, a->sinks));
    }
    op->data = a->out;
    for (ggml_tensor* t : {q, k, v}) {
        t->data = t->view_src->data;
    }
#ifdef KERNELS
    const size_t work_size = ggml_attention_work_size(op, a->n_threads);
    return run(op, a->n_threads, work_size, ggml_attention_by_kv_head);
#else
    return run(context, op, a->n_threads);
#endif
}
}
