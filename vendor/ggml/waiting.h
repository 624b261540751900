// How threads of ggml's pool wait for each other at a barrier. Included by ggml-cpu.c, after
// ggml_thread_cpu_relax.
//
// A thread spins for a short while: threads that all run meet within it. Then it sleeps and leaves
// its core to whoever wants it, which on a shared machine may be the very thread that it waits for.
#pragma once

#include "ggml.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#if defined(__linux__)
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif !defined(_WIN32)
#include <sched.h>
#endif

enum {
    GGML_SPIN_US = 50,   // about what it takes to wake a thread
    GGML_SPIN_ROUND = 32 // pauses between two looks at the clock
};

// Spins until *value is not `old` for at most GGML_SPIN_US; returns whether it is.
static inline bool ggml_spin_while(atomic_int* value, int old) {
    int64_t start = 0;
    for (int i = 0;; i++) {
        if (atomic_load_explicit(value, memory_order_relaxed) != old) {
            return true;
        }
        if (i % GGML_SPIN_ROUND == GGML_SPIN_ROUND - 1) {
            const int64_t now = ggml_time_us();
            start = start == 0 ? now : start;
            if (now - start > GGML_SPIN_US) {
                return false;
            }
        }
        ggml_thread_cpu_relax();
    }
}

// Waits until *value is not `old`. *n_asleep counts the threads that sleep for it.
static inline void ggml_wait_while(atomic_int* value, int old, atomic_int* n_asleep) {
    if (ggml_spin_while(value, old)) {
        return;
    }
#if defined(__linux__)
    // The one that changes *value looks at *n_asleep afterwards: either it sees this thread, or
    // the system call sees the change and returns.
    atomic_fetch_add_explicit(n_asleep, 1, memory_order_seq_cst);
    while (atomic_load_explicit(value, memory_order_seq_cst) == old) {
        syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
    }
    atomic_fetch_sub_explicit(n_asleep, 1, memory_order_relaxed);
#else
    (void)n_asleep;
    while (atomic_load_explicit(value, memory_order_relaxed) == old) {
#if defined(_WIN32)
        SwitchToThread();
#else
        sched_yield();
#endif
    }
#endif
}

// Wakes the threads that sleep for *value, which has changed.
static inline void ggml_wake_all(atomic_int* value, atomic_int* n_asleep) {
#if defined(__linux__)
    if (atomic_load_explicit(n_asleep, memory_order_seq_cst) > 0) {
        syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
#else
    (void)value;
    (void)n_asleep;
#endif
}
