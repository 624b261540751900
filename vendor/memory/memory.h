// What a context takes of each device's memory, which llama.cpp tells in C++ only.

#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct llama_context;
struct ggml_backend_device;

// Bytes on one device.
struct medusa_memory {
    struct ggml_backend_device* device;  // null: memory of the host
    size_t weights;
    size_t cache;    // keys, values and states
    size_t compute;  // buffers of the largest graph
};

// Writes what the context and its model take to out, the host first, and returns the number of
// devices; at most n are written. Of a model that was loaded with no_alloc it is what they would take.
size_t medusa_memory_of(const struct llama_context* context, struct medusa_memory* out, size_t n);

#ifdef __cplusplus
}
#endif
