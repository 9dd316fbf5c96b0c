// Edits rows of activations in place on the CPU; the structs mirror those that cpu.py fills in.
//
// A row's stream is base = own + residual. The blocks change it one after another in float32,
//
//     change += scale * sum_j step_j w_j,    step = map(U (base + change)),
//
// and own' = round(own + change). The sums of one row run in an order that depends on its own program
// alone, and asking for norms changes no edit, so a row's bits do not depend on its neighbours. Nothing is
// written for a row that no block moved.
//
// Portable vector types only: no intrinsics, no framework's headers, no runtime library.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct Rows {  // both null: no rows
    const float* dense;      // [count, width]
    const int64_t* columns;  // [count], the coordinate that is one
};

struct Block {
    int64_t count;
    Rows write, read;
    const float *bias, *threshold, *gain, *offset, *low, *high;  // [count]
    int64_t relative, only_if_active, preserve_norm, gate;
};

struct Program {
    int64_t width;
    const float* constant;        // [width] or null: all that the program does is add this
    const float* constant_norms;  // [n_blocks]
    const int64_t* columns;       // [n_columns] or null: the only coordinates touched; the blocks count from them
    int64_t n_columns;
    int64_t n_blocks;
    const Block* blocks;
};

struct Group {
    const Program* program;
    const int64_t* rows;  // [count]
    int64_t count;
};

struct Table {
    const Group* groups;
    int64_t n_groups, n_rows;
    int64_t scratch;  // floats that one thread needs
    int64_t threads;  // 1: on the caller's thread
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
};

namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int LANES = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef float FloatsAt __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint16_t HalvesAt __attribute__((vector_size(32), aligned(2), may_alias));

// -- element types; F and W are float and uint32_t, or vectors of them ----------------------------

template <class To, class From> INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

struct BFloat16 {
    template <class F, class W> static INLINE F widen(W h) {
        return bits<F>(W(h << 16));
    }
    template <class F, class W> static INLINE W narrow(F f) {
        W u = bits<W>(f), rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        return (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded;
    }
};

struct Float16 {
    template <class F, class W> static INLINE F widen(W h) {
        W magnitude = (h & 0x7fffu) << 13, exponent = magnitude & (0x7c00u << 13);
        W normal = magnitude + (112u << 23);
        W special = magnitude + (224u << 23);
        W subnormal = bits<W>(F(bits<F>(W(magnitude + (113u << 23))) - bits<F>(W((W)(magnitude & 0u) + (113u << 23)))));
        W out = exponent == 0u ? subnormal : exponent == (0x7c00u << 13) ? special : normal;
        return bits<F>(W(out | ((h & 0x8000u) << 16)));
    }
    template <class F, class W> static INLINE W narrow(F f) {
        W u = bits<W>(f), sign = u & 0x80000000u, a = u ^ sign;
        W magic = (a & 0u) + (126u << 23);
        W large = a > (255u << 23) ? (a & 0u) + 0x7e00u : (a & 0u) + 0x7c00u;
        W small = bits<W>(F(bits<F>(a) + bits<F>(magic))) - magic;
        W normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
        W out = a >= (143u << 23) ? large : a < (113u << 23) ? small : normal;
        return out | (sign >> 16);
    }
};

template <class Format>
struct Half {
    using Raw = uint16_t;
    static INLINE float get(const Raw* p) { return Format::template widen<float, uint32_t>(*p); }
    static INLINE void put(Raw* p, float f) { *p = (Raw)Format::template narrow<float, uint32_t>(f); }
    static INLINE Floats load(const Raw* p) {
        return Format::template widen<Floats, Words>(__builtin_convertvector(*(const HalvesAt*)p, Words));
    }
    static INLINE void store(Raw* p, Floats f) {
        *(HalvesAt*)p = __builtin_convertvector((Format::template narrow<Floats, Words>(f)), Halves);
    }
};

struct Single {
    using Raw = float;
    static INLINE float get(const Raw* p) { return *p; }
    static INLINE void put(Raw* p, float f) { *p = f; }
    static INLINE Floats load(const Raw* p) { return *(const FloatsAt*)p; }
    static INLINE void store(Raw* p, Floats f) { *(FloatsAt*)p = f; }
};

// n values, the rest zero; n is a constant but for a row's last few.
template <class E>
INLINE Floats load(const typename E::Raw* p, int n) {
    if (n == LANES) return E::load(p);
    typename E::Raw all[LANES] = {};
    memcpy(all, p, n * sizeof *p);
    return E::load(all);
}

template <class E>
INLINE void store(typename E::Raw* p, Floats f, int n) {
    if (n == LANES) return E::store(p, f);
    typename E::Raw all[LANES];
    E::store(all, f);
    memcpy(p, all, n * sizeof *p);
}

template <class F> INLINE void sweep(int64_t d, F f) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) f(i, LANES);
    if (i < d) f(i, (int)(d - i));
}

// -- vectors --------------------------------------------------------------------------------------

INLINE float sum(Floats v) {
    float t[LANES];
    memcpy(t, &v, sizeof t);
    for (int h = LANES / 2; h; h /= 2)
        for (int i = 0; i < h; i++) t[i] += t[i + h];
    return t[0];
}

float dot(const float* u, const float* s, int64_t d) {
    Floats a[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES)
        for (int k = 0; k < 4; k++) a[k] += Single::load(u + i + k * LANES) * Single::load(s + i + k * LANES);
    sweep(d - i, [&](int64_t k, int n) { a[0] += load<Single>(u + i + k, n) * load<Single>(s + i + k, n); });
    return sum((a[0] + a[1]) + (a[2] + a[3]));
}

void dot4(const float* u, const float* s, int64_t d, float* out) {
    Floats a[4] = {};
    sweep(d, [&](int64_t i, int n) {
        Floats v = load<Single>(s + i, n);
        for (int k = 0; k < 4; k++) a[k] += load<Single>(u + k * d + i, n) * v;
    });
    for (int k = 0; k < 4; k++) out[k] = sum(a[k]);
}

float norm(const float* s, int64_t d) { return sqrtf(dot(s, s, d)); }

// ||a + sign*b||
float norm_of(const float* a, const float* b, float sign, int64_t d) {
    Floats total = {};
    sweep(d, [&](int64_t i, int n) {
        Floats v = load<Single>(a + i, n) + sign * load<Single>(b + i, n);
        total += v * v;
    });
    return sqrtf(sum(total));
}

// -- blocks ---------------------------------------------------------------------------------------

struct Scratch {
    float *base, *change, *stream, *before, *step;
};

// step = what each of the block's rows reads
void read(const Block& b, const float* s, int64_t d, float* step) {
    if (b.read.columns) {
        for (int64_t j = 0; j < b.count; j++) step[j] = s[b.read.columns[j]];
    } else if (b.read.dense) {
        int64_t j = 0;
        for (; j + 4 <= b.count; j += 4) dot4(b.read.dense + j * d, s, d, step + j);
        for (; j < b.count; j++) step[j] = dot(b.read.dense + j * d, s, d);
    } else {
        memset(step, 0, b.count * sizeof *step);
    }
}

// step = scale * (a' - a); whether any is not zero
bool map(const Block& b, float scale, float* step) {
    int moved = 0;
    for (int64_t j = 0; j < b.count; j++) {
        float p = step[j] + b.bias[j];
        bool active = p > b.threshold[j];
        float a = active ? p : 0.0f;
        float to = b.gain[j] * a + b.offset[j];
        to = to < b.low[j] ? b.low[j] : to;
        to = to > b.high[j] ? b.high[j] : to;
        float by = b.only_if_active && !active ? 0.0f : (to - a) * scale;
        step[j] = by;
        moved |= by != 0.0f;
    }
    return moved;
}

// change += sum_j step_j w_j
void write(const Block& b, const float* step, float* change, int64_t d) {
    if (b.write.columns) {
        for (int64_t j = 0; j < b.count; j++) change[b.write.columns[j]] += step[j];
        return;
    }
    int64_t j = 0;
    for (; j + 4 <= b.count; j += 4) {
        const float* w = b.write.dense + j * d;
        sweep(d, [&](int64_t i, int n) {
            Floats v = load<Single>(change + i, n);
            for (int k = 0; k < 4; k++) v += step[j + k] * load<Single>(w + k * d + i, n);
            store<Single>(change + i, v, n);
        });
    }
    for (; j < b.count; j++) {
        const float* w = b.write.dense + j * d;
        sweep(d, [&](int64_t i, int n) {
            store<Single>(change + i, load<Single>(change + i, n) + step[j] * load<Single>(w + i, n), n);
        });
    }
}

// Rescales base + change to the length `before`.
void rescale(const float* base, float* change, float before, int64_t d) {
    float after = norm_of(base, change, 1, d);
    if (!(after > 0)) return;
    const float ratio = before / after;
    sweep(d, [&](int64_t i, int n) {
        store<Single>(change + i, ratio * load<Single>(change + i, n) + (ratio - 1) * load<Single>(base + i, n), n);
    });
}

// Fills m.change from m.base; whether any block moved anything.
bool run(const Program& p, int64_t d, const Scratch& m, const float* gates, float* norms) {
    bool changed = false;
    memset(m.change, 0, d * sizeof *m.change);
    for (int64_t i = 0; i < p.n_blocks; i++) {
        const Block& b = p.blocks[i];
        const float* s = m.base;
        if (norms) norms[i] = 0;
        float scale = b.gate < 0 ? 1 : gates[b.gate];
        if (scale == 0) continue;
        if (changed && (b.read.dense || b.read.columns || b.relative)) {
            s = m.stream;
            for (int64_t k = 0; k < d; k++) m.stream[k] = m.base[k] + m.change[k];
        }
        read(b, s, d, m.step);
        if (b.relative) scale *= norm(s, d);
        if (!map(b, scale, m.step)) continue;
        if (norms) memcpy(m.before, m.change, d * sizeof *m.before);
        const float before = b.preserve_norm ? norm_of(m.base, m.change, 1, d) : 0;  // by the sum that gives `after`
        write(b, m.step, m.change, d);
        if (b.preserve_norm) rescale(m.base, m.change, before, d);
        if (norms) norms[i] = norm_of(m.change, m.before, -1, d);
        changed = true;
    }
    return changed;
}

// -- rows -----------------------------------------------------------------------------------------

template <class E>
INLINE Floats stream(const typename E::Raw* x, const typename E::Raw* residual, int64_t i, int n) {
    return residual ? load<E>(x + i, n) + load<E>(residual + i, n) : load<E>(x + i, n);
}

template <class E>
float square(const typename E::Raw* x, const typename E::Raw* residual, int64_t d) {
    Floats total = {};
    sweep(d, [&](int64_t i, int n) {
        Floats v = stream<E>(x, residual, i, n);
        total += v * v;
    });
    return sum(total);
}

template <class E>
void edit_row(const Program& p, typename E::Raw* x, const typename E::Raw* residual, const Scratch& m,
              const float* gates, float* norms, float* squared) {
    const int64_t d = p.width;
    if (squared) *squared = square<E>(x, residual, d);
    if (p.constant) {
        sweep(d, [&](int64_t i, int n) { store<E>(x + i, load<E>(x + i, n) + load<Single>(p.constant + i, n), n); });
        if (norms) memcpy(norms, p.constant_norms, p.n_blocks * sizeof *norms);
    } else if (p.columns) {
        for (int64_t k = 0; k < p.n_columns; k++) m.base[k] = E::get(x + p.columns[k]);
        for (int64_t k = 0; residual && k < p.n_columns; k++) m.base[k] += E::get(residual + p.columns[k]);
        if (!run(p, p.n_columns, m, gates, norms)) return;
        for (int64_t k = 0; k < p.n_columns; k++) {
            typename E::Raw* at = x + p.columns[k];
            E::put(at, E::get(at) + m.change[k]);
        }
    } else {
        sweep(d, [&](int64_t i, int n) { store<Single>(m.base + i, stream<E>(x, residual, i, n), n); });
        if (!run(p, d, m, gates, norms)) return;
        sweep(d, [&](int64_t i, int n) { store<E>(x + i, load<E>(x + i, n) + load<Single>(m.change + i, n), n); });
    }
}

template <class E>
struct Call {
    const Table* table;
    typename E::Raw* x;
    int64_t x_stride;
    const typename E::Raw* residual;
    int64_t residual_stride;
    const float* gates;
    int64_t gates_stride;
    float* norms;
    int64_t norms_stride;
    float* squares;
    int64_t chunk = 0, next = 0;
};

// Edits the table's rows from `first` to `last` or the table's end.
template <class E>
void edit_rows(const Call<E>& c, int64_t first, int64_t last) {
    const int64_t most = 12288;
    alignas(64) float small[most];
    const int64_t size = c.table->scratch;
    float* memory = size > most ? (float*)malloc(size * sizeof *memory) : small;
    if (!memory) abort();
    int64_t start = 0;  // of the group, among the table's rows
    for (int64_t g = 0; g < c.table->n_groups && start < last; g++) {
        const Group& group = c.table->groups[g];
        const Program& p = *group.program;
        const int64_t d = ((p.columns ? p.n_columns : p.width) + LANES - 1) & -LANES;
        const Scratch m = {memory, memory + d, memory + 2 * d, memory + 3 * d, memory + 4 * d};
        const int64_t stop = start + group.count < last ? start + group.count : last;
        for (int64_t k = first > start ? first : start; k < stop; k++) {
            const int64_t row = group.rows[k - start];
            edit_row<E>(p, c.x + row * c.x_stride, c.residual ? c.residual + row * c.residual_stride : nullptr, m,
                        c.gates ? c.gates + k * c.gates_stride : nullptr,
                        c.norms ? c.norms + k * c.norms_stride : nullptr, c.squares ? c.squares + k : nullptr);
        }
        start += group.count;
    }
    if (memory != small) free(memory);
}

// One thread's share: chunks of rows until none is left, whichever thread takes which.
template <class E>
void work(void* data) {
    Call<E>& c = *(Call<E>*)data;
    for (int64_t first; (first = __atomic_fetch_add(&c.next, c.chunk, __ATOMIC_RELAXED)) < c.table->n_rows;)
        edit_rows(c, first, first + c.chunk);
}

template <class E>
int edit(int64_t n, Call<E> call) {
    const Table* table = call.table;
    for (int64_t g = 0; g < table->n_groups; g++)
        for (int64_t k = 0; k < table->groups[g].count; k++)
            if ((uint64_t)table->groups[g].rows[k] >= (uint64_t)n) return 1;
    const int64_t chunks = 4 * table->threads;
    call.chunk = (table->n_rows + chunks - 1) / chunks;
    if (table->threads > 1 && table->parallel)
        table->parallel(work<E>, &call, (unsigned)table->threads, 0);
    else
        edit_rows(call, 0, table->n_rows);
    return 0;
}

// -- injection ------------------------------------------------------------------------------------

// Row k of `carried` [count, d] is added to row rows[k] of x, which keeps its length.
template <class E>
int inject(typename E::Raw* x, int64_t n, int64_t stride, int64_t d, const int64_t* rows, int64_t count,
           const float* carried, const float* gates, int64_t g_stride, float* norms, int64_t n_stride, float* squares) {
    for (int64_t k = 0; k < count; k++)
        if ((uint64_t)rows[k] >= (uint64_t)n) return 1;
    for (int64_t k = 0; k < count; k++) {
        typename E::Raw* own = x + rows[k] * stride;
        const float* more = carried + k * d;
        Floats before = {}, after = {}, size = {};
        Words given = {};
        sweep(d, [&](int64_t i, int m) {
            Floats v = load<E>(own + i, m), c = load<Single>(more + i, m), y = v + c;
            before += v * v;
            after += y * y;
            given |= Words(c != Floats{});
        });
        const float length = sum(before), longer = sum(after);
        if (squares) squares[k] = length;
        if (norms) norms[k * n_stride] = 0;
        uint32_t any = 0;
        for (int j = 0; j < LANES; j++) any |= given[j];
        if (!any || (gates && gates[k * g_stride] == 0)) continue;
        const float ratio = longer > 0 ? sqrtf(length) / sqrtf(longer) : 1;
        sweep(d, [&](int64_t i, int m) {
            Floats v = load<E>(own + i, m), y = ratio * (v + load<Single>(more + i, m)), change = y - v;
            size += change * change;
            store<E>(own + i, y, m);
        });
        if (norms) norms[k * n_stride] = sqrtf(sum(size));
    }
    return 0;
}

}  // namespace

// 0, or 1 when the table names a row past the n of x; then nothing is edited.
#define EDIT(name, E)                                                                                           \
    extern "C" __attribute__((visibility("default"))) int name(                                                 \
        const Table* table, E::Raw* x, int64_t n, int64_t x_stride, const E::Raw* residual, int64_t r_stride,   \
        const float* gates, int64_t g_stride, float* norms, int64_t n_stride, float* squares) {                 \
        return edit<E>(n, {table, x, x_stride, residual, r_stride, gates, g_stride, norms, n_stride, squares}); \
    }

EDIT(edit_float32, Single)
EDIT(edit_bfloat16, Half<BFloat16>)
EDIT(edit_float16, Half<Float16>)

// 0, or 1 when a row is named past the n of x; then nothing is edited.
#define INJECT(name, E)                                                                                           \
    extern "C" __attribute__((visibility("default"))) int name(                                                   \
        E::Raw* x, int64_t n, int64_t stride, int64_t d, const int64_t* rows, int64_t count,                      \
        const float* carried, const float* gates, int64_t g_stride, float* norms, int64_t n_stride,               \
        float* squares) {                                                                                         \
        return inject<E>(x, n, stride, d, rows, count, carried, gates, g_stride, norms, n_stride, squares);       \
    }

INJECT(inject_float32, Single)
INJECT(inject_bfloat16, Half<BFloat16>)
INJECT(inject_float16, Half<Float16>)
