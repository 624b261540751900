// What CUDA's words mean on a CPU: enough to run the kernels of cuda/ as they stand, slowly and strictly.
//
// A launch runs its blocks one after the other, and each thread of a block as a fiber that runs until it must wait: at a
// barrier for the block, at a shuffle or vote for its warp. The order of threads is another one in every launch, so that a missing
// barrier gives a wrong result sooner or later. Waits that can never end and barriers that threads reach in different places
// stop the program.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <tuple>
#include <ucontext.h>
#include <utility>
#include <vector>

#define KERNEL extern "C" void
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulation {

constexpr int WARP_SIZE = 32;
constexpr size_t STACK_BYTES = 64 << 10;
// What a block may ask for of shared memory, beside what the kernel declares.
constexpr size_t SHARED_BYTES = 48 << 10;

enum class State { Ready, AtBarrier, InWarp, Done };

struct Thread {
    dim3 index;
    State state;
    const char *place; // where it waits
    jmp_buf at;
    ucontext_t start;
    bool started;
    std::vector<char> stack;
};

struct Warp {
    uint64_t given[WARP_SIZE];
    uint64_t published[WARP_SIZE];
    unsigned arrived;
    unsigned mask;
    const char *place;
};

[[noreturn]] inline void fail(const char *what, const char *place) {
    std::fprintf(stderr, "emulated kernel: %s (%s)\n", what, place ? place : "?");
    std::abort();
}

// The launch that runs now; one at a time.
struct Launch {
    std::mutex alone;
    dim3 grid, block, block_index;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Thread *current = nullptr;
    jmp_buf scheduler;
    ucontext_t back;
    void (*body)(void *) = nullptr;
    void *closure = nullptr;
    uint64_t order = 88172645463325252u;
    alignas(16) unsigned char shared[SHARED_BYTES];
};

inline Launch &launch_state() {
    static Launch state;
    return state;
}

inline uint64_t next_random() {
    uint64_t &x = launch_state().order;
    x ^= x << 13;
    x ^= x >> 7;
    return x ^= x << 17;
}

// Gives the processor back until somebody made this thread ready.
inline void wait(State state, const char *place) {
    Launch &launch = launch_state();
    Thread *self = launch.current;
    self->state = state;
    self->place = place;
    if (_setjmp(self->at) == 0) {
        _longjmp(launch.scheduler, 1);
    }
}

inline void enter_thread() {
    Launch &launch = launch_state();
    launch.body(launch.closure);
    launch.current->state = State::Done;
    _longjmp(launch.scheduler, 1);
}

inline void resume(Thread &thread) {
    Launch &launch = launch_state();
    launch.current = &thread;
    if (_setjmp(launch.scheduler) != 0) {
        return;
    }
    if (thread.started) {
        _longjmp(thread.at, 1);
    }
    thread.started = true;
    swapcontext(&launch.back, &thread.start);
}

// All waiting threads go on if none runs any more.
inline void release_barrier() {
    Launch &launch = launch_state();
    const char *place = nullptr;
    for (Thread &thread : launch.threads) {
        if (thread.state == State::InWarp) {
            fail("a warp waits for lanes that wait elsewhere", thread.place);
        }
        if (thread.state == State::AtBarrier) {
            if (place && std::strcmp(place, thread.place) != 0) {
                fail("threads of a block wait at different barriers", thread.place);
            }
            place = thread.place;
            thread.state = State::Ready;
        }
    }
}

inline void run_block() {
    Launch &launch = launch_state();
    std::memset(launch.shared, 0xff, SHARED_BYTES); // not a number, wherever it is read too soon
    const size_t n = launch.threads.size();
    for (size_t i = 0; i < n; ++i) {
        Thread &thread = launch.threads[i];
        thread.index = {static_cast<unsigned>(i % launch.block.x), static_cast<unsigned>(i / launch.block.x), 0};
        thread.state = State::Ready;
        thread.started = false;
        thread.stack.resize(STACK_BYTES);
        getcontext(&thread.start);
        thread.start.uc_stack.ss_sp = thread.stack.data();
        thread.start.uc_stack.ss_size = STACK_BYTES;
        thread.start.uc_link = nullptr;
        makecontext(&thread.start, enter_thread, 0);
    }
    for (Warp &warp : launch.warps) {
        warp.arrived = 0;
    }
    for (size_t left = n; left > 0;) {
        const size_t offset = next_random() % n;
        const bool backward = next_random() % 2;
        bool ran = false;
        for (size_t i = 0; i < n; ++i) {
            Thread &thread = launch.threads[(offset + (backward ? n - i : i)) % n];
            if (thread.state == State::Ready) {
                resume(thread);
                ran = true;
                left -= thread.state == State::Done;
            }
        }
        if (!ran) {
            release_barrier();
        }
    }
}

// Runs the kernel with the arguments that `args` points to, as cuLaunchKernel takes them.
template <class... Args, size_t... I>
void run(void (*kernel)(Args...), const dim3 &grid, const dim3 &block, void **args, std::index_sequence<I...>) {
    Launch &launch = launch_state();
    const std::lock_guard<std::mutex> guard(launch.alone);
    std::tuple<Args...> values(*static_cast<Args *>(args[I])...);
    auto call = [&] { std::apply(kernel, values); };
    launch.body = [](void *closure) { (*static_cast<decltype(call) *>(closure))(); };
    launch.closure = &call;
    launch.grid = grid;
    launch.block = block;
    const size_t n = static_cast<size_t>(block.x) * block.y * block.z;
    if (n == 0 || n > 1024 || n % WARP_SIZE != 0) {
        fail("a block of no whole warps, or too large", "launch");
    }
    launch.threads.resize(n);
    launch.warps.resize(n / WARP_SIZE);
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                launch.block_index = {x, y, z};
                run_block();
            }
        }
    }
}

template <class... Args> void run(void (*kernel)(Args...), const dim3 &grid, const dim3 &block, void **args) {
    run(kernel, grid, block, args, std::index_sequence_for<Args...>());
}

// Gives `value` to the warp and waits until all lanes of `mask` did; what they gave is then in `published`.
inline const uint64_t *exchange(unsigned mask, uint64_t value, const char *place) {
    Launch &launch = launch_state();
    const size_t self = static_cast<size_t>(launch.current - launch.threads.data());
    Warp &warp = launch.warps[self / WARP_SIZE];
    const unsigned bit = 1u << (self % WARP_SIZE);
    if (!(mask & bit)) {
        fail("a lane calls for a mask without itself", place);
    }
    if (warp.arrived == 0) {
        warp.mask = mask;
        warp.place = place;
    } else if (warp.mask != mask || std::strcmp(warp.place, place) != 0) {
        fail("lanes of a warp meet at different places", place);
    }
    warp.given[self % WARP_SIZE] = value;
    warp.arrived |= bit;
    if (warp.arrived != mask) {
        wait(State::InWarp, place);
        return warp.published;
    }
    std::memcpy(warp.published, warp.given, sizeof warp.given);
    warp.arrived = 0;
    for (size_t lane = 0; lane < WARP_SIZE; ++lane) {
        Thread &thread = launch.threads[self / WARP_SIZE * WARP_SIZE + lane];
        if (&thread != launch.current && (mask >> lane & 1)) {
            thread.state = State::Ready;
        }
    }
    return warp.published;
}

inline unsigned own_lane() {
    Launch &launch = launch_state();
    return static_cast<unsigned>(launch.current - launch.threads.data()) % WARP_SIZE;
}

template <class T> T shuffle(unsigned mask, T value, unsigned from, const char *place) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a register");
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    const uint64_t *given = exchange(mask, bits, place);
    if (from < WARP_SIZE && (mask >> from & 1)) {
        std::memcpy(&value, &given[from], sizeof value);
    }
    return value;
}

inline unsigned ballot(unsigned mask, bool vote, const char *place) {
    const uint64_t *given = exchange(mask, vote, place);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < WARP_SIZE; ++lane) {
        votes |= (mask >> lane & 1) && given[lane] ? 1u << lane : 0;
    }
    return votes;
}

template <class T> T atomic_add(T *at, T value) {
    const T old = *at;
    *at = old + value;
    return old;
}

} // namespace emulation

#define EMULATION_TEXT_OF(line) #line
#define EMULATION_TEXT(line) EMULATION_TEXT_OF(line)
#define EMULATION_PLACE __FILE__ ":" EMULATION_TEXT(__LINE__)

#define threadIdx (emulation::launch_state().current->index)
#define blockIdx (emulation::launch_state().block_index)
#define blockDim (emulation::launch_state().block)
#define gridDim (emulation::launch_state().grid)

#define __syncthreads() emulation::wait(emulation::State::AtBarrier, EMULATION_PLACE)
#define __threadfence() static_cast<void>(0)
#define __shfl_xor_sync(mask, value, distance) \
    emulation::shuffle(mask, value, emulation::own_lane() ^ static_cast<unsigned>(distance), EMULATION_PLACE)
#define __shfl_up_sync(mask, value, distance) \
    emulation::shuffle(mask, value, emulation::own_lane() - static_cast<unsigned>(distance), EMULATION_PLACE)
#define __ballot_sync(mask, vote) emulation::ballot(mask, vote, EMULATION_PLACE)
#define __ffs(bits) __builtin_ffs(static_cast<int>(bits))
#define atomicAdd(at, value) emulation::atomic_add(at, value)

#define DYNAMIC_SHARED(type, name) type *name = reinterpret_cast<type *>(emulation::launch_state().shared)

// A function for the tests that launches the kernel, with arguments as cuLaunchKernel takes them.
#define EMULATED(kernel)                                                                                        \
    extern "C" void launch_##kernel(unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block, void **args) { \
        emulation::run(kernel, {grid_x, grid_y, grid_z}, {block, 1, 1}, args);                                  \
    }

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

inline float emulated_half_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) {
        return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    }
    if (exponent == 0) {
        const float value = std::ldexp(static_cast<float>(fraction), -24);
        return sign ? -value : value;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
