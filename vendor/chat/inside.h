// Included before llama.cpp's sources: what they do that a server's library must not.

#pragma once

// A failed assertion must not end the process. One of ggml's is an error of the call.
#ifndef NDEBUG
#define NDEBUG
#endif

#include <cassert>
#include <cstdio>
#include <ctime>
#include <stdexcept>
#include <utility>

#include "ggml.h"

#undef GGML_ASSERT
#undef GGML_ABORT
#define GGML_ASSERT(x) ((x) ? (void)0 : throw std::logic_error("failed: " #x))
#define GGML_ABORT(...) throw std::logic_error("unexpected state")

// Warnings and debugging.
#define fprintf(...) ((void)0)

// std::localtime returns what another thread may be writing to.
std::tm* medusa_local_time(const std::time_t* time);
#define localtime(time) forward<std::tm*>(medusa_local_time(time))
