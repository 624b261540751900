// Flash attention for one KV head at a time: the entry points that ggml-cpu calls.
#pragma once

#include "ggml-cpu-impl.h"

#ifdef __cplusplus
extern "C" {
#endif

// The bytes of work buffer with which the FLASH_ATTN_EXT `op` is fastest; 0 if it is not supported.
size_t ggml_attention_work_size(const struct ggml_tensor* op, int n_threads);

// Computes the FLASH_ATTN_EXT `op`. Returns false, having done nothing, for types and shapes that
// it does not support, and where the work buffer is too small.
bool ggml_attention_by_kv_head(const struct ggml_compute_params* params, struct ggml_tensor* op);

#ifdef __cplusplus
}
#endif
