// Edits rows of activations in place on an NVIDIA GPU, whatever program each of them has.
//
// The programs lie in three arrays, as tables.py describes them. A block of threads takes a row:
//
//     base = x + residual,   change += scale * sum_j step_j w_j,   step = map(U (base + change)),
//
// block by block of its program, and then x' = round(x + change). `change` lies in shared memory as float32; every
// thread owns the same groups of eight elements of it from first to last, so a dense write needs no barrier, and
// base is read again from the first-level cache. A row without a program costs one integer and one lookup.
//
// edit_and_norm does that and goes on as a layer does, with every row: z = x' + residual in float32, residual = round(z)
// and x = round(z / rms(z) * weight), with the roundings in between that norms.py's Form asks for.
//
// Sums run in an order that depends on the width alone, so a row's bits depend on itself, its program and its
// gates, and on no alignment, neighbour or number of rows. Asking for norms or squares changes no bit of an edit.
//
// No header but parts.cuh is needed: NVRTC compiles the two as they are.

#include "parts.cuh"

namespace {

constexpr int RELATIVE = 1, ONLY_IF_ACTIVE = 2, PRESERVE_NORM = 4, READS = 8, READ_COLUMNS = 16, WRITE_COLUMNS = 32,
              DECIDES = 128, COSINE = 256, INJECTS = 512, CARRIES = 1024, FIRST = 2048;
constexpr int BLOCK_WORDS = 4, ROW_WORDS = 8, READ = 0, WRITE = 1;  // of `code`
constexpr int ONE_MORE = 1, ROUNDED_SUM = 2, ROUNDED_QUOTIENT = 4;  // of norms.py's Form
constexpr int MAX_ROWS = 1024;                                      // of a block
constexpr int BATCH = 32;                                           // dots between two barriers
constexpr int SQUARE = BATCH;                                       // a slot beside theirs

#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED extern __shared__
#endif

// As cuda_edit.py packs them. Strides are in elements; a column index past a `columns` is not looked at.
struct Arguments {
    void* x;             // [rows, width]
    void* residual;      // [rows, width] or null
    const void* weight;  // [width] or null: all one
    const int* entries;  // [rows]
    const int* starts;   // [entries, places]
    const int* code;
    const float* vectors;
    float* gates;        // [rows, gates_columns] or null
    float* norms;        // [rows, norms_columns] or null
    float* squares;      // [rows] or null
    float* carry;        // [carry_rows, carry_slots, carry_width] or null; the width is a multiple of 8
    float* values;       // [values_rows, values_columns] or null
    long long x_stride, residual_stride, gates_stride, norms_stride;
    int rows, width, place, places, gates_columns, norms_columns, carry_rows, carry_slots, carry_width,
        values_rows, values_columns;
    int form;  // of the norm
    float eps;
};
static_assert(sizeof(Arguments) == 184, "cuda_edit.py packs 180 bytes, and 4 are padding");

struct Shared {
    float steps[MAX_ROWS];
    float partial[2][BATCH + 1][MAX_WARPS + 1];  // in turn, so that one barrier separates writing from reading
    double sums[3][MAX_WARPS];
    float ratio, gap;
};

// -- a row ------------------------------------------------------------------------------------------

// scale * (a' - a) of the coordinate t
DEVICE float mapped(const int* row, float t, int flags, float scale) {
    const float bias = __int_as_float(row[2]), threshold = __int_as_float(row[3]), gain = __int_as_float(row[4]),
                offset = __int_as_float(row[5]), low = __int_as_float(row[6]), high = __int_as_float(row[7]);
    const float p = t + bias;
    const bool active = p > threshold;
    const float a = active ? p : 0.0f;
    float to = gain * a + offset;
    to = to < low ? low : to;
    to = to > high ? high : to;
    return flags & ONLY_IF_ACTIVE && !active ? 0.0f : (to - a) * scale;
}

// A reading, of its dot or cosine. A threshold or bound that is not there is NaN.
DEVICE float activated(const int* row, float value) {
    const float threshold = __int_as_float(row[3]), p = value + __int_as_float(row[2]);
    return threshold != threshold || p > threshold ? p : 0.0f;
}

// Whether it is within its bounds, 0 or 1.
DEVICE float holds(const int* row, float value) {
    const float above = __int_as_float(row[6]), below = __int_as_float(row[7]), a = activated(row, value);
    return (above != above || a > above) && (below != below || a < below) ? 1.0f : 0.0f;
}

// WIDE: rows are whole groups, at addresses of which 16 bytes can be read at once
template <class E, bool WIDE>
struct Row {
    using Raw = typename E::Raw;

    const Arguments& args;
    Shared& shared;
    float4* change;  // the first halves of all groups, then the second ones: neighbours fall into different banks
    int groups, thread, threads, turn;
    Raw *x, *residual;
    float *gates, *norms;
    float4* carry;  // null: the row has none
    bool moved;  // `change` holds something
    bool whole;  // `change` holds the stream, base and all

    DEVICE Row(const Arguments& a, Shared& s, float4* memory)
        : args(a), shared(s), change(memory), groups((a.width + GROUP - 1) / GROUP), thread(threadIdx.x),
          threads(blockDim.x), turn(0) {}

    DEVICE void open(int i) {
        x = (Raw*)args.x + i * args.x_stride;
        residual = args.residual ? (Raw*)args.residual + i * args.residual_stride : nullptr;
        gates = args.gates ? args.gates + i * args.gates_stride : nullptr;
        norms = args.norms ? args.norms + i * args.norms_stride : nullptr;
        const long long carried = (long long)args.carry_slots * args.carry_width;
        carry = args.carry && i < args.carry_rows ? (float4*)(args.carry + i * carried) : nullptr;
        moved = whole = false;
    }

    DEVICE int left(int g) const { return args.width - g * GROUP; }

    DEVICE void base(int g, float (&s)[GROUP]) const {
        const Pack<Raw> own = fetch<WIDE>(x + g * GROUP, left(g));
#pragma unroll
        for (int k = 0; k < GROUP; k++) s[k] = E::get(own.v[k]);
        if (!residual) return;
        const Pack<Raw> other = fetch<WIDE>(residual + g * GROUP, left(g));
#pragma unroll
        for (int k = 0; k < GROUP; k++) s[k] += E::get(other.v[k]);
    }

    DEVICE void changed(int g, float (&c)[GROUP]) const {
        if (moved) return unpack(change[g], change[groups + g], c);
#pragma unroll
        for (int k = 0; k < GROUP; k++) c[k] = 0;
    }

    DEVICE void keep(int g, const float (&c)[GROUP]) {
        change[g] = make_float4(c[0], c[1], c[2], c[3]);
        change[groups + g] = make_float4(c[4], c[5], c[6], c[7]);
    }

    DEVICE void stream(int g, float (&s)[GROUP]) const {
        if (whole) return changed(g, s);
        base(g, s);
        if (!moved) return;
        float c[GROUP];
        changed(g, c);
#pragma unroll
        for (int k = 0; k < GROUP; k++) s[k] += c[k];
    }

    DEVICE float& change_at(int column) {
        const int g = column / GROUP, k = column % GROUP;
        return ((float*)change)[(g + (k >= 4 ? groups : 0)) * 4 + k % 4];
    }

    DEVICE float stream_at(int column) {
        float s = E::get(x[column]);
        if (residual) s += E::get(residual[column]);
        return moved ? s + change_at(column) : s;
    }

    // The warp's shares of the dots with `count` directions (of CHUNK), and of the stream's square if it is wanted.
    DEVICE void dots(const int* rows, int count, bool square, float (*partial)[MAX_WARPS + 1], int slot) const {
        const float* u[CHUNK];
#pragma unroll
        for (int k = 0; k < CHUNK; k++) u[k] = args.vectors + (k < count ? 4LL * rows[k * ROW_WORDS + READ] : 0);
        float sums[CHUNK] = {}, squared = 0;
        for (int g = thread; g < groups; g += threads) {
            float s[GROUP], v[CHUNK][GROUP] = {};
#pragma unroll
            for (int k = 0; k < CHUNK; k++)
                if (k < count) direction<WIDE>(u[k] + g * GROUP, left(g), v[k]);
            stream(g, s);
#pragma unroll
            for (int k = 0; k < CHUNK; k++)
#pragma unroll
                for (int e = 0; e < GROUP; e++) sums[k] += v[k][e] * s[e];
            if (square)
#pragma unroll
                for (int e = 0; e < GROUP; e++) squared += s[e] * s[e];
        }
        const int lane = thread % WARP, warp = thread / WARP;
        if (count) {
            const float sum = warp_sums(sums);
            const int k = (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0);
            if (lane % 8 == 0 && k < count) partial[slot + k][warp] = sum;
        }
        if (square) {
            squared = warp_sum(squared);
            if (lane == 0) partial[SQUARE][warp] = squared;
        }
    }

    // The square of the stream's length, known to all threads; a barrier.
    DEVICE float square() {
        float(*partial)[MAX_WARPS + 1] = shared.partial[turn ^= 1];
        dots(nullptr, 0, true, partial, 0);
        __syncthreads();
        return total(partial[SQUARE]);
    }

    // Sum over the block, known to all threads; a barrier.
    DEVICE float sum(float v) {
        float* shares = shared.partial[turn ^= 1][0];
        v = warp_sum(v);
        if (thread % WARP == 0) shares[thread / WARP] = v;
        __syncthreads();
        return total(shares);
    }

    // Fills shared.steps; whether any is not zero. A barrier before, so that all are done with the last block's.
    DEVICE bool read(const int* rows, int count, int flags, float scale) {
        const bool dense = (flags & READS) && !(flags & READ_COLUMNS);
        int any = 0;
        if (flags & RELATIVE)
            scale *= sqrtf(square());
        else if (!dense)
            __syncthreads();
        for (int first = 0; dense && first < count; first += BATCH) {
            const int n = min(BATCH, count - first);
            float(*partial)[MAX_WARPS + 1] = shared.partial[turn ^= 1];
            for (int c = 0; c < n; c += CHUNK)
                dots(rows + (first + c) * ROW_WORDS, min(CHUNK, n - c), false, partial, c);
            __syncthreads();
            if (thread < n) {
                const float step = mapped(rows + (first + thread) * ROW_WORDS, total(partial[thread]), flags, scale);
                shared.steps[first + thread] = step;
                any |= step != 0;
            }
        }
        for (int j = thread; !dense && j < count; j += threads) {
            const int* row = rows + j * ROW_WORDS;
            const float step = mapped(row, flags & READS ? stream_at(row[READ]) : 0.0f, flags, scale);
            shared.steps[j] = step;
            any |= step != 0;
        }
        return __syncthreads_or(any);
    }

    // What a thread's share of a write adds to the sums m.m, m.s and s.s, for the move m and the stream s before.
    struct Sums {
        double mm = 0, ms = 0, ss = 0;
        float square = 0;  // m.m in float32, where no length is kept

        DEVICE void stream(const float (&s)[GROUP]) {
#pragma unroll
            for (int k = 0; k < GROUP; k++) ss += (double)s[k] * s[k];
        }
        DEVICE void move(float m, float s) { mm += (double)m * m, ms += (double)m * s; }
    };

    template <bool PRESERVE>
    DEVICE void write_dense(const int* rows, int count, Sums& sums) {
        for (int g = thread; g < groups; g += threads) {
            float m[GROUP] = {};
            for (int j = 0; j < count; j += CHUNK) {
                float w[CHUNK][GROUP] = {}, step[CHUNK] = {};
#pragma unroll
                for (int k = 0; k < CHUNK; k++)
                    if (j + k < count) {
                        step[k] = shared.steps[j + k];
                        direction<WIDE>(args.vectors + 4LL * rows[(j + k) * ROW_WORDS + WRITE] + g * GROUP, left(g),
                                        w[k]);
                    }
#pragma unroll
                for (int k = 0; k < CHUNK; k++)
#pragma unroll
                    for (int e = 0; e < GROUP; e++) m[e] += step[k] * w[k][e];
            }
            if constexpr (PRESERVE) {
                float s[GROUP];
                stream(g, s);
                sums.stream(s);
#pragma unroll
                for (int e = 0; e < GROUP; e++) sums.move(m[e], s[e]);
            }
            float c[GROUP];
            changed(g, c);
#pragma unroll
            for (int e = 0; e < GROUP; e++) sums.square += m[e] * m[e], c[e] += m[e];
            keep(g, c);
        }
    }

    // The first row that names a column adds up all that do. `change` is filled.
    DEVICE void write_columns(const int* rows, int count, bool preserve, Sums& sums) {
        for (int j = thread; j < count; j += threads) {
            const int column = rows[j * ROW_WORDS + WRITE];
            if (j && rows[(j - 1) * ROW_WORDS + WRITE] == column) continue;
            float m = shared.steps[j];
            for (int k = j + 1; k < count && rows[k * ROW_WORDS + WRITE] == column; k++) m += shared.steps[k];
            if (preserve) sums.move(m, stream_at(column));
            sums.square += m * m;
            change_at(column) += m;
        }
    }

    // Rescales the stream to its length before the block; the square of the block's whole change, for thread 0.
    // Sums in float64: what is left of the stream may be a small difference of large numbers.
    DEVICE double rescale(Sums& sums) {
        const double shares[3] = {warp_sum(sums.mm), warp_sum(sums.ms), warp_sum(sums.ss)};
        if (thread % WARP == 0)
            for (int k = 0; k < 3; k++) shared.sums[k][thread / WARP] = shares[k];
        __syncthreads();
        double square = 0;
        if (thread == 0) {
            const double mm = total(shared.sums[0]), ms = total(shared.sums[1]), ss = total(shared.sums[2]);
            const double after = ss + 2 * ms + mm, ratio = after > 0 ? sqrt(ss / after) : 1, gap = ratio - 1;
            square = ratio * ratio * mm + 2 * ratio * gap * ms + gap * gap * ss;
            shared.ratio = (float)ratio, shared.gap = (float)gap;
        }
        __syncthreads();
        const float ratio = shared.ratio, gap = shared.gap;
        for (int g = thread; g < groups; g += threads) {
            float s[GROUP], c[GROUP];
            base(g, s);
            changed(g, c);
#pragma unroll
            for (int k = 0; k < GROUP; k++) c[k] = ratio * c[k] + gap * s[k];
            keep(g, c);
        }
        return square;
    }

    // One block of a program; the square of its change, for thread 0, if it is wanted.
    DEVICE double block(const int* rows, int count, int flags, float scale) {
        const bool columns = flags & WRITE_COLUMNS, preserve = flags & PRESERVE_NORM;
        if (columns && !moved)
            for (int g = thread; g < groups; g += threads) {
                const float zero[GROUP] = {};
                keep(g, zero);
            }
        if (!read(rows, count, flags, scale)) return 0;
        Sums sums;
        if (columns) {
            moved = true;
            if (preserve) {
                for (int g = thread; g < groups; g += threads) {
                    float s[GROUP];
                    stream(g, s);
                    sums.stream(s);
                }
                __syncthreads();
            }
            write_columns(rows, count, preserve, sums);
        } else if (preserve) {
            write_dense<true>(rows, count, sums);
        } else {
            write_dense<false>(rows, count, sums);
        }
        moved = true;
        if (columns) __syncthreads();
        if (preserve) return rescale(sums);
        return norms ? sum(sums.square) : 0;
    }

    // Reads a gate for blocks at later places.
    DEVICE void decide(const int* row, int flags, int gate) {
        float(*partial)[MAX_WARPS + 1] = shared.partial[turn ^= 1];
        dots(row, 1, flags & COSINE, partial, 0);
        __syncthreads();
        if (thread == 0 && gates && gate < args.gates_columns) {
            float value = total(partial[0]);
            if (flags & COSINE) {
                const float length = sqrtf(total(partial[SQUARE]));
                value /= length < 1e-30f ? 1e-30f : length;
            }
            gates[gate] = holds(row, value);
        }
        __syncthreads();  // all threads see the same gates
    }

    DEVICE float4* slot(const int* row) const {
        const int s = row[WRITE];
        return carry && s < args.carry_slots ? carry + s * (args.carry_width / 4) : nullptr;
    }

    // change += scale * (y * |s| / |y| - s), y = s + carried; the square of that, for thread 0, if it is wanted.
    DEVICE double inject(const float4* carried, float scale) {
        float before = 0, after = 0;
        for (int g = thread; g < groups; g += threads) {
            float s[GROUP], y[GROUP];
            stream(g, s);
            unpack(carried[2 * g], carried[2 * g + 1], y);
#pragma unroll
            for (int k = 0; k < GROUP; k++) before += s[k] * s[k], y[k] += s[k], after += y[k] * y[k];
        }
        before = sum(before), after = sum(after);
        const float ratio = after > 0 ? sqrtf(before) / sqrtf(after) : 1.0f;
        float squared = 0;
        for (int g = thread; g < groups; g += threads) {
            float s[GROUP], c[GROUP], y[GROUP];
            stream(g, s);
            changed(g, c);
            unpack(carried[2 * g], carried[2 * g + 1], y);
#pragma unroll
            for (int k = 0; k < GROUP; k++) {
                const float m = scale * ((s[k] + y[k]) * ratio - s[k]);
                squared += m * m, c[k] += m;
            }
            keep(g, c);
        }
        moved = true;
        return norms ? sum(squared) : 0;
    }

    // Adds what came to the place to what is carried, or begins with it.
    DEVICE void source(const int* row, int flags) {
        float4* carried = slot(row);
        const float weight = __int_as_float(row[2]);
        for (int g = thread; carried && g < groups; g += threads) {
            float s[GROUP], y[GROUP] = {};
            base(g, s);
            if (!(flags & FIRST)) unpack(carried[2 * g], carried[2 * g + 1], y);
#pragma unroll
            for (int k = 0; k < GROUP; k++) y[k] += weight * s[k];
            carried[2 * g] = make_float4(y[0], y[1], y[2], y[3]);
            carried[2 * g + 1] = make_float4(y[4], y[5], y[6], y[7]);
        }
    }

    // What `rows` read of the stream when all is done.
    DEVICE void probe(const int* rows, int count, int i) {
        if (!args.values || i >= args.values_rows) return;
        float* values = args.values + (long long)i * args.values_columns;
        for (int first = 0; first < count; first += BATCH) {
            const int n = min(BATCH, count - first);
            float(*partial)[MAX_WARPS + 1] = shared.partial[turn ^= 1];
            for (int c = 0; c < n; c += CHUNK)
                dots(rows + (first + c) * ROW_WORDS, min(CHUNK, n - c), false, partial, c);
            __syncthreads();
            const int* row = rows + (first + thread) * ROW_WORDS;
            if (thread < n && row[WRITE] < args.values_columns)
                values[row[WRITE]] = activated(row, total(partial[thread]));
        }
    }

    // Fills `change`, norms and squares; where the program's probes are.
    DEVICE const int* run(const int* code, int i) {
        if (args.squares) {
            const float squared = square();
            if (thread == 0) args.squares[i] = squared;
        }
        int last = -1;
        double size = 0;  // the square of a block's change; parts of one block follow each other
        const int blocks = *code++;
        for (int b = 0; b < blocks; b++) {
            const int flags = code[0], count = code[1], gate = code[2], index = code[3];
            const int* rows = code + BLOCK_WORDS;
            code = rows + count * ROW_WORDS;
            if (flags & DECIDES) {
                decide(rows, flags, gate);
                continue;
            }
            if (flags & CARRIES) {
                source(rows, flags);
                continue;
            }
            const float scale = gate < 0 ? 1.0f : gate < args.gates_columns ? gates[gate] : 0.0f;
            if (index != last) size = 0, last = index;
            if (flags & INJECTS) {
                if (scale != 0 && slot(rows)) size += inject(slot(rows), scale);
            } else if (count && scale != 0) {
                size += block(rows, count, flags, scale);
            }
            if (norms && thread == 0 && index < args.norms_columns) norms[index] = (float)sqrt(size);
        }
        return code;
    }

    // x = round(x + change), where anything was changed
    DEVICE void finish() {
        for (int g = thread; moved && g < groups; g += threads) {
            float c[GROUP];
            changed(g, c);
            bool any = false;
#pragma unroll
            for (int k = 0; k < GROUP; k++) any |= c[k] != 0;
            if (!any) continue;
            Pack<Raw> own = fetch<WIDE>(x + g * GROUP, left(g));
#pragma unroll
            for (int k = 0; k < GROUP; k++)
                if (c[k] != 0) own.v[k] = E::put(E::get(own.v[k]) + c[k]);
            store<WIDE>(x + g * GROUP, own, left(g));
        }
    }

    // x' = round(x + change), z = x' + residual; residual = round(z), x = round(z / rms(z) * weight)
    DEVICE void finish_and_norm() {
        float squared = 0;
        for (int g = thread; g < groups; g += threads) {
            const Pack<Raw> own = fetch<WIDE>(x + g * GROUP, left(g)), other = fetch<WIDE>(residual + g * GROUP, left(g));
            Pack<Raw> rounded;
            float c[GROUP], z[GROUP];
            changed(g, c);
#pragma unroll
            for (int k = 0; k < GROUP; k++) {
                const float to = c[k] != 0 ? E::get(E::put(E::get(own.v[k]) + c[k])) : E::get(own.v[k]);
                z[k] = to + E::get(other.v[k]);
                rounded.v[k] = E::put(z[k]);
                if (args.form & ROUNDED_SUM) z[k] = E::get(rounded.v[k]);
                squared += z[k] * z[k];
            }
            store<WIDE>(residual + g * GROUP, rounded, left(g));
            keep(g, z);
        }
        const float inverse = rsqrtf(sum(squared) / (float)args.width + args.eps);
        const Raw* weight = (const Raw*)args.weight;
        moved = true;  // `change` holds z
        for (int g = thread; g < groups; g += threads) {
            float z[GROUP];
            changed(g, z);
            Pack<Raw> out;
#pragma unroll
            for (int k = 0; k < GROUP; k++) z[k] *= inverse;
            if (weight) {
                const Pack<Raw> w = fetch<WIDE>(weight + g * GROUP, left(g));
#pragma unroll
                for (int k = 0; k < GROUP; k++) {
                    const float factor = E::get(w.v[k]);
                    if (args.form & ROUNDED_QUOTIENT) z[k] = E::get(E::put(z[k]));
                    z[k] *= args.form & ONE_MORE ? 1.0f + factor : factor;
                }
            }
#pragma unroll
            for (int k = 0; k < GROUP; k++) out.v[k] = E::put(z[k]);
            store<WIDE>(x + g * GROUP, out, left(g));
        }
    }
};

// Takes rows as they come until there are none left, so that a grid of any size does all of them.
template <class E, bool WIDE, bool NORM>
DEVICE void edit_rows(const Arguments& args, Shared& shared, float4* memory) {
    Row<E, WIDE> row(args, shared, memory);
    for (int i = blockIdx.x; i < args.rows; i += gridDim.x) {
        const int entry = args.entries[i];
        const int start = entry < 0 ? 0 : args.starts[(long long)entry * args.places + args.place];
        if (!NORM && !start) continue;
        row.open(i);
        const int* probes = start ? row.run(args.code + start, i) : nullptr;
        if constexpr (NORM)
            row.finish_and_norm();
        else
            row.finish();
        if (probes && *probes) {
            row.moved = row.whole = NORM;  // the stream is what `change` holds then, else it is read again
            row.probe(probes + 1, *probes, i);
        }
    }
}

}  // namespace

#define KERNEL(name, ...)                                                                    \
    extern "C" __global__ void __launch_bounds__(MAX_THREADS, 2) name(const Arguments args) { \
        DYNAMIC_SHARED float4 memory[]; /* [2, groups] */                                     \
        __shared__ Shared shared;                                                             \
        edit_rows<__VA_ARGS__>(args, shared, memory);                                         \
    }

#define KERNELS(dtype, E)                             \
    KERNEL(edit_##dtype, E, false, false)             \
    KERNEL(edit_##dtype##_wide, E, true, false)       \
    KERNEL(edit_and_norm_##dtype, E, false, true)     \
    KERNEL(edit_and_norm_##dtype##_wide, E, true, true)

KERNELS(float32, Single)
KERNELS(bfloat16, BFloat16)
KERNELS(float16, Float16)
