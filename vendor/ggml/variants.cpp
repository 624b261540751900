// ggml's CPU backend compiled for several kinds of processors in one binary. build/cpu.rs compiles
// the copies, gives each one's entry points a suffix and hides the rest; the functions here have
// the names without suffix, and call the copy for the processor that they run on.

#include "ggml-backend.h"
#include "ggml-cpu.h"

#include <cstdio>
#include <cstdlib>

// build/cpu.rs writes variants.inc: a line VARIANT(name, condition) for each copy, best first.
extern "C" {
#define VARIANT(name, condition)                                                                   \
    decltype(ggml_backend_cpu_reg) ggml_backend_cpu_reg_##name;                                    \
    decltype(ggml_graph_plan) ggml_graph_plan_##name;                                              \
    decltype(ggml_graph_compute) ggml_graph_compute_##name;                                        \
    decltype(ggml_threadpool_new) ggml_threadpool_new_##name;                                      \
    decltype(ggml_threadpool_free) ggml_threadpool_free_##name;
#include "variants.inc"
#undef VARIANT
}

namespace {

struct Variant {
    bool runs_here;
    decltype(&ggml_backend_cpu_reg) reg;
    decltype(&ggml_graph_plan) plan;
    decltype(&ggml_graph_compute) compute;
    decltype(&ggml_threadpool_new) threadpool_new;
    decltype(&ggml_threadpool_free) threadpool_free;
};

// The condition of a variant holds only if the operating system saves the registers too.
Variant choose() {
    __builtin_cpu_init();
    const Variant variants[] = {
#define VARIANT(name, condition)                                                                   \
    {(condition),                                                                                  \
     ggml_backend_cpu_reg_##name,                                                                  \
     ggml_graph_plan_##name,                                                                       \
     ggml_graph_compute_##name,                                                                    \
     ggml_threadpool_new_##name,                                                                   \
     ggml_threadpool_free_##name},
#include "variants.inc"
#undef VARIANT
    };
    for (const Variant& variant : variants) {
        if (variant.runs_here) {
            return variant;
        }
    }
    fputs("error: this program needs a processor with AVX2, FMA, F16C and BMI2\n", stderr);
    exit(1);
}

const Variant& here() {
    static const Variant variant = choose();
    return variant;
}

} // namespace

extern "C" {

ggml_backend_reg_t ggml_backend_cpu_reg() { return here().reg(); }

ggml_cplan ggml_graph_plan(const ggml_cgraph* graph, int n_threads, ggml_threadpool* pool) {
    return here().plan(graph, n_threads, pool);
}

ggml_status ggml_graph_compute(ggml_cgraph* graph, ggml_cplan* plan) {
    return here().compute(graph, plan);
}

ggml_threadpool* ggml_threadpool_new(ggml_threadpool_params* params) {
    return here().threadpool_new(params);
}

void ggml_threadpool_free(ggml_threadpool* pool) { here().threadpool_free(pool); }
}
