// What a layer does between its products, row by row. All of it is to be called by all threads of a team. Widths are
// multiples of LANES.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "vectors.h"

// out[width] = x / root mean square, times weight.
inline void norm_row(const float* x, const float* weight, float eps, int64_t width, float* out) {
    Vec squares = zero();
    for (int64_t i = 0; i < width; i += LANES) squares = multiply_add(load(x + i), load(x + i), squares);
    Vec factor = spread(1 / std::sqrt(sum_of(squares) / width + eps));
    for (int64_t i = 0; i < width; i += LANES) store(out + i, load(x + i) * factor * load(weight + i));
}

inline void norm(const float* x, const float* weight, float eps, float* out, int64_t num_rows, int64_t width) {
#pragma omp for
    for (int64_t row = 0; row < num_rows; row++) norm_row(x + row * width, weight, eps, width, out + row * width);
}

// The residual stream [N][D] += x, after x's own norm and times `multiplier`; out = the stream's norm. A weight may be
// null: then there is no such norm, and out is the stream.
struct Addition {
    const float *post_weight, *next_weight;
    float eps, multiplier;
};

inline void add(const Addition& a, float* x, float* stream, float* out, int64_t num_rows, int64_t width) {
#pragma omp for
    for (int64_t row = 0; row < num_rows; row++) {
        float *own = x + row * width, *sum = stream + row * width;
        if (a.post_weight) norm_row(own, a.post_weight, a.eps, width, own);
        for (int64_t i = 0; i < width; i += LANES)
            store(sum + i, multiply_add(load(own + i), spread(a.multiplier), load(sum + i)));
        if (a.next_weight)
            norm_row(sum, a.next_weight, a.eps, width, out + row * width);
        else
            std::copy(sum, sum + width, out + row * width);
    }
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2 };

inline Vec activate(Vec x, int64_t activation) {
    if (activation == SILU) return x / (spread(1) + exponential(spread(0) - x));
    if (activation == GELU_TANH) {  // x * (1 + tanh y) / 2 is x / (1 + e^-2y)
        Vec y = x * multiply_add(x * x, spread(0.044715f), spread(1)) * spread(0.7978845608f);
        return x / (spread(1) + exponential(spread(-2) * y));
    }
    alignas(64) float lanes[LANES];
    store(lanes, x);
    for (float& lane : lanes) lane = 0.5f * lane * std::erfc(lane * -0.70710678f);
    return load(lanes);
}

// out [N][F] = the activation of the first half of gate_up [N][2F], times the second.
inline void gate(const float* gate_up, float* out, int64_t num_rows, int64_t width, int64_t activation) {
    constexpr int64_t SIZE = 32 * LANES;
    int64_t parts = (width + SIZE - 1) / SIZE;
#pragma omp for
    for (int64_t at = 0; at < num_rows * parts; at++) {
        int64_t row = at / parts, first = at % parts * SIZE;
        const float *gates = gate_up + row * 2 * width, *ups = gates + width;
        for (int64_t i = first; i < std::min(first + SIZE, width); i += LANES)
            store(out + row * width + i, activate(load(gates + i), activation) * load(ups + i));
    }
}

struct HeadNorm {
    int64_t first, groups, width;  // `groups` groups of `width` columns each, from column `first` on
    const float* weight;  // [groups][width]
};

struct Rotation {
    const float* table;  // [rows][turned]: cosines, then sines
    const int64_t *positions, *slots;  // [N]: rows of the table; places in the cache
    float *queries, *keys, *values;  // [N][H][d], and the caches of one layer
    int64_t num_heads, num_kv_heads, width, turned;
};

inline void rotate_head(const float* head, const float* table, int64_t width, int64_t turned, float* out) {
    int64_t half = turned / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = head[i] * table[i] - head[half + i] * table[half + i];
        out[half + i] = head[half + i] * table[i] + head[i] * table[half + i];
    }
    std::copy(head + turned, head + width, out + turned);
}

// Queries and keys of qkv [N][(H + 2K) d], normed and with the first `turned` numbers of each head rotated; keys and
// values go into the cache.
inline void rotate(const Rotation& r, const HeadNorm* norms, int64_t num_norms, float eps, float* qkv, int64_t num_rows) {
    int64_t num_heads = r.num_heads + 2 * r.num_kv_heads, width = r.width;
#pragma omp for
    for (int64_t row = 0; row < num_rows; row++) {
        float* heads = qkv + row * num_heads * width;
        for (int64_t n = 0; n < num_norms; n++)
            for (int64_t g = 0; g < norms[n].groups; g++) {
                float* group = heads + norms[n].first + g * norms[n].width;
                norm_row(group, norms[n].weight + g * norms[n].width, eps, norms[n].width, group);
            }
        const float* table = r.table + r.positions[row] * r.turned;
        for (int64_t h = 0; h < r.num_heads; h++)
            rotate_head(heads + h * width, table, width, r.turned, r.queries + (row * r.num_heads + h) * width);
        int64_t block = r.slots[row] / KEYS, place = r.slots[row] % KEYS;
        for (int64_t h = 0; h < r.num_kv_heads; h++) {
            int64_t to = ((block * r.num_kv_heads + h) * KEYS + place) * width;
            rotate_head(heads + (r.num_heads + h) * width, table, width, r.turned, r.keys + to);
            const float* value = heads + (r.num_heads + r.num_kv_heads + h) * width;
            std::copy(value, value + width, r.values + to);
        }
    }
}
