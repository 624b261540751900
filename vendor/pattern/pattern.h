// Whether llama.cpp can read a pattern of tensors' names. It compiles patterns while a model is loaded,
// and its error does not say which of them is invalid.

#pragma once

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Returns false for an invalid pattern, and writes the reason to why: at most n bytes with the zero
// at its end; n is not 0.
bool medusa_pattern_is_valid(const char* pattern, char* why, size_t n);

#ifdef __cplusplus
}
#endif
