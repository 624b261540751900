// What a model's own draft layers (NextN, also called MTP) continue from, which llama.cpp tells in C++ only.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;

// From the next pass on, a context keeps the state that draft layers continue from: of every row of a batch, or of
// those with outputs only.
void medusa_nextn_keep(struct llama_context* context, bool outputs_only);

// The state of a row of the last batch, or null. It is valid until the next pass. Waits for the device.
const float* medusa_nextn_row(struct llama_context* context, int32_t row);

#ifdef __cplusplus
}
#endif
