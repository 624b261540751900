// Matrix multiplications with a few rows of activations: the entry points that ggml-cpu calls.
#pragma once

#include "ggml-cpu-impl.h"

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Whether this build has kernels for weights of a type in blocks of eight rows, as
// ggml_few_rows_repack writes them.
bool ggml_few_rows_repacks(enum ggml_type type);

// Bytes of work buffer that the MUL_MAT `op` needs here; 0 if the kernels do not support it.
// `repacked`: its weights are stored in blocks of eight rows.
size_t ggml_few_rows_work_size(const struct ggml_tensor* op, bool repacked);

// Computes the MUL_MAT `op`. Returns false, having done nothing, if the work size above is 0.
bool ggml_few_rows_mul_mat(const struct ggml_compute_params* params, struct ggml_tensor* op,
                           bool repacked);

// Writes the rows at `data` to the tensor's memory, in blocks of eight rows. The
// number of rows is a multiple of eight.
void ggml_few_rows_repack(struct ggml_tensor* weights, const void* data, size_t data_size);

#ifdef __cplusplus
}
#endif
