// CUDA's words for a C++ compiler without a GPU, as far as kernels/cuda uses them.
//
// Every thread of a block is a fiber of one thread of the processor. From one barrier to the next, one warp after
// another runs all the way, in an order drawn anew each time, so that a missing barrier shows. Shared memory of a
// size given at launch is full of NaN when a block starts.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define DYNAMIC_SHARED extern

struct Index {
    unsigned x;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

constexpr int MOST_SHARED = 1 << 18, GUARD = 1 << 12;  // bytes
alignas(16) inline float4 memory[(MOST_SHARED + GUARD) / sizeof(float4)];

namespace emulation {

constexpr int LANES = 32;
constexpr size_t STACK = 1 << 16;
enum State { READY, BARRIER, SHUFFLE, DONE };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(STACK);
    State state;
    int mask, flag;       // of a shuffle, given to a barrier
    uint64_t given, got;  // by a shuffle
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current, any;
inline void (*body)();

inline void wait(State state) {
    Fiber& mine = fibers[current];
    mine.state = state;
    swapcontext(&mine.context, &scheduler);
}

inline void enter() {
    body();
    fibers[current].state = DONE;  // and on to the scheduler, by uc_link
}

// Runs a warp until it comes to a barrier or ends, in any order of its lanes from one shuffle to the next.
inline void run_warp(int first, std::mt19937& random) {
    int lanes[LANES];
    for (int i = 0; i < LANES; i++) lanes[i] = first + i;
    Fiber* warp = &fibers[first];
    for (;;) {
        std::shuffle(lanes, lanes + LANES, random);
        for (int i : lanes)
            if (fibers[i].state == READY) {
                current = i;
                threadIdx.x = (unsigned)i;
                swapcontext(&scheduler, &fibers[i].context);
            }
        if (!std::all_of(warp, warp + LANES, [&](Fiber& f) { return f.state == SHUFFLE && f.mask == warp->mask; }))
            return;
        for (int lane = 0; lane < LANES; lane++) warp[lane].got = warp[lane ^ warp->mask].given;
        for (int lane = 0; lane < LANES; lane++) warp[lane].state = READY;
    }
}

inline bool all(State state) {
    return std::all_of(fibers.begin(), fibers.end(), [&](Fiber& f) { return f.state == state; });
}

// Runs one block of threads; what went wrong, or "".
inline std::string run_block(std::mt19937& random) {
    for (Fiber& f : fibers) {
        f.state = READY;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = STACK;
        f.context.uc_link = &scheduler;
        makecontext(&f.context, enter, 0);
    }
    std::vector<int> warps;
    for (size_t first = 0; first < fibers.size(); first += LANES) warps.push_back((int)first);
    for (;;) {
        std::shuffle(warps.begin(), warps.end(), random);
        for (int first : warps) run_warp(first, random);
        if (all(DONE)) return "";
        if (!all(BARRIER)) return "threads wait at different places";
        any = 0;
        for (Fiber& f : fibers) any |= f.flag;
        for (Fiber& f : fibers) f.state = READY;
    }
}

// Runs a grid of blocks one after another; what went wrong, or "".
inline std::string run(void (*kernel)(), unsigned grid, unsigned threads, size_t shared, unsigned seed) {
    if (threads % LANES || shared > MOST_SHARED) return "no such launch";
    std::mt19937 random(seed);
    body = kernel;
    fibers.resize(threads);
    gridDim.x = grid;
    blockDim.x = threads;
    char* guard = (char*)memory + shared;
    for (unsigned block = 0; block < grid; block++) {
        blockIdx.x = block;
        memset(memory, 0xff, sizeof memory);
        std::string wrong = run_block(random);
        if (!wrong.empty()) return wrong;
        if (std::any_of(guard, guard + GUARD, [](char c) { return c != (char)0xff; })) return "past shared memory";
    }
    return "";
}

}  // namespace emulation

inline int __syncthreads_or(int flag) {
    emulation::fibers[emulation::current].flag = flag;
    emulation::wait(emulation::BARRIER);
    return emulation::any;
}

inline void __syncthreads() { __syncthreads_or(0); }

template <class T>
inline T __shfl_xor_sync(unsigned lanes, T value, int mask) {
    emulation::Fiber& mine = emulation::fibers[emulation::current];
    if (lanes != 0xffffffffu) std::abort();
    mine.given = 0;
    memcpy(&mine.given, &value, sizeof value);
    mine.mask = mask;
    emulation::wait(emulation::SHUFFLE);
    memcpy(&value, &mine.got, sizeof value);
    return value;
}

template <class To, class From>
inline To emulated_bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "same size");
    memcpy(&to, &from, sizeof to);
    return to;
}

inline float __uint_as_float(unsigned u) { return emulated_bits<float>(u); }
inline float __int_as_float(int i) { return emulated_bits<float>(i); }
inline unsigned __float_as_uint(float f) { return emulated_bits<unsigned>(f); }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float rsqrtf(float f) { return 1 / std::sqrt(f); }

// Aborts where the hardware would: 16 bytes at an address that is no multiple of 16.
template <class T>
inline T __ldg(const T* p) {
    if ((uintptr_t)p % sizeof(T)) std::abort();
    return *p;
}

using std::min;

inline float half_to_float(unsigned short r) {
    const int exponent = r >> 10 & 31, fraction = r & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : std::ldexp((float)(exponent ? fraction + 1024 : fraction), std::max(exponent, 1) - 25);
    return r >> 15 ? -size : size;
}

// To the nearest half, ties to even: a multiple of the step at this size, which a double holds.
inline unsigned short float_to_half(float f) {
    const unsigned sign = std::signbit(f) ? 0x8000u : 0u;
    const double size = std::fabs((double)f);
    if (std::isnan(f)) return (unsigned short)(sign | 0x7e00u);
    if (size >= 65520) return (unsigned short)(sign | 0x7c00u);
    int exponent = -14;
    while (size >= std::ldexp(1.0, exponent + 1)) exponent++;
    const unsigned steps = (unsigned)std::nearbyint(std::ldexp(size, 10 - exponent));  // up to 2048: carries over
    return (unsigned short)(sign | (((unsigned)(exponent + 14) << 10) + steps));
}
