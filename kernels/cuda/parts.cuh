// What edit.cu is made of: element types, groups of eight elements, and sums over a block of threads.

#pragma once

namespace {

#define DEVICE __device__ __forceinline__

constexpr int MAX_THREADS = 256, WARP = 32, MAX_WARPS = MAX_THREADS / WARP;
constexpr int GROUP = 8;  // elements that a thread reads and writes at once
constexpr int CHUNK = 4;  // directions that it reads at once

// -- element types ----------------------------------------------------------------------------------

struct Single {
    using Raw = float;
    static DEVICE float get(Raw r) { return r; }
    static DEVICE Raw put(float f) { return f; }
};

struct BFloat16 {
    using Raw = unsigned short;
    static DEVICE float get(Raw r) { return __uint_as_float((unsigned)r << 16); }
    static DEVICE Raw put(float f) {
        const unsigned u = __float_as_uint(f);
        if ((u & 0x7fffffffu) > 0x7f800000u) return (Raw)((u >> 16) | 0x40u);
        return (Raw)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    }
};

struct Float16 {
    using Raw = unsigned short;
#ifdef __CUDACC__
    static DEVICE float get(Raw r) {
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(r));
        return f;
    }
    static DEVICE Raw put(float f) {
        Raw r;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(f));
        return r;
    }
#else
    static float get(Raw r) { return half_to_float(r); }
    static Raw put(float f) { return float_to_half(f); }
#endif
};

// -- memory -----------------------------------------------------------------------------------------

template <class Raw>
struct alignas(16) Pack {
    Raw v[GROUP];
};

// A group of which `left` elements are there; the rest is zero. WIDE: all are there, and aligned.
template <bool WIDE, class Raw>
DEVICE Pack<Raw> fetch(const Raw* p, int left) {
    if constexpr (WIDE) {
        return *(const Pack<Raw>*)p;
    } else {
        Pack<Raw> out;
#pragma unroll
        for (int k = 0; k < GROUP; k++) out.v[k] = k < left ? p[k] : Raw(0);
        return out;
    }
}

template <bool WIDE, class Raw>
DEVICE void store(Raw* p, const Pack<Raw>& pack, int left) {
    if constexpr (WIDE) {
        *(Pack<Raw>*)p = pack;
    } else {
#pragma unroll
        for (int k = 0; k < GROUP; k++)
            if (k < left) p[k] = pack.v[k];
    }
}

DEVICE void unpack(float4 a, float4 b, float (&v)[GROUP]) {
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// A group of a direction, whose rows in `vectors` are padded with zeros to whole float4s.
template <bool WIDE>
DEVICE void direction(const float* v, int left, float (&out)[GROUP]) {
    const float4 a = __ldg((const float4*)v);
    const float4 b = WIDE || left > GROUP / 2 ? __ldg((const float4*)v + 1) : make_float4(0, 0, 0, 0);
    unpack(a, b, out);
}

// -- sums over the block ----------------------------------------------------------------------------

template <class S>
DEVICE S warp_sum(S v) {
#pragma unroll
    for (int mask = WARP / 2; mask; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
    return v;
}

// The warps' shares of one sum, in order.
template <class S>
DEVICE S total(const S* shares) {
    S sum = 0;
    const int warps = blockDim.x / WARP;
#pragma unroll
    for (int w = 0; w < MAX_WARPS; w++)
        if (w < warps) sum += shares[w];
    return sum;
}

// Half of the values stay with a lane, half go to its partner, until each lane has one: the sum of value
// (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0) over the warp.
DEVICE float warp_sums(const float (&v)[CHUNK]) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    float a = upper ? v[2] : v[0], b = upper ? v[3] : v[1];
    a += __shfl_xor_sync(0xffffffffu, upper ? v[0] : v[2], 16);
    b += __shfl_xor_sync(0xffffffffu, upper ? v[1] : v[3], 16);
    float c = odd ? b : a;
    c += __shfl_xor_sync(0xffffffffu, odd ? a : b, 8);
#pragma unroll
    for (int mask = 4; mask; mask /= 2) c += __shfl_xor_sync(0xffffffffu, c, mask);
    return c;
}

}  // namespace
