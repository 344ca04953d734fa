// x W^T for weights that lie packed in panels, and packing them.
//
// A panel is PANEL rows of W side by side: [ceil(O / PANEL)][I][PANEL]. Rows past the end are zeros. Each output is the
// sum over I in order, whatever the number of rows of x: a row's result does not depend on which rows are beside it.
#pragma once

#include <omp.h>

#include <algorithm>

#include "vectors.h"

constexpr int PANEL = 2 * LANES;
constexpr int64_t DEPTH = 256;  // of a block of a panel, which all rows of x read from the first-level cache
constexpr int64_t ROW_CHUNK = 120;

// out[ROWS][PANELS * PANEL] (+)= x[ROWS][depth] * weights[depth][PANEL] of PANELS panels, which lie `panel_stride` apart.
template <int ROWS, int PANELS, class W>
inline void multiply(const float* x, int64_t x_stride, const W* weights, int64_t panel_stride, int64_t depth,
                     float* out, int64_t out_stride, bool adds) {
    Vec sums[ROWS][PANELS][2];
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++)
            for (int half = 0; half < 2; half++)
                sums[r][p][half] = adds ? load(out + r * out_stride + p * PANEL + half * LANES) : zero();
    for (int64_t k = 0; k < depth; k++) {
        for (int p = 0; p < PANELS; p++) {
            const W* row = weights + p * panel_stride + k * PANEL;
            Vec first = in_register(load(row)), second = in_register(load(row + LANES));
            for (int r = 0; r < ROWS; r++) {
                Vec factor = spread(x[r * x_stride + k]);
                sums[r][p][0] = multiply_add(factor, first, sums[r][p][0]);
                sums[r][p][1] = multiply_add(factor, second, sums[r][p][1]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++)
            for (int half = 0; half < 2; half++)
                store(out + r * out_stride + p * PANEL + half * LANES, sums[r][p][half]);
}

// As `multiply` with one panel, for a number of rows that is not known when this is compiled.
template <int ROWS, class W>
inline void multiply_some(int num_rows, const float* x, int64_t x_stride, const W* weights, int64_t depth, float* out,
                          int64_t out_stride, bool adds) {
    if constexpr (ROWS > 0) {
        if (num_rows == ROWS)
            multiply<ROWS, 1, W>(x, x_stride, weights, 0, depth, out, out_stride, adds);
        else
            multiply_some<ROWS - 1, W>(num_rows, x, x_stride, weights, depth, out, out_stride, adds);
    }
}

// Some rows of x with one panel, in blocks of about equal size; `out` has room for PANEL columns.
template <class W>
inline void multiply_panel(const float* x, const W* weights, float* out, int64_t num_rows, int64_t depth,
                           int64_t out_stride) {
    int64_t num_blocks = (num_rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t first = 0; first < depth; first += DEPTH) {
        int64_t size = std::min(DEPTH, depth - first);
        for (int64_t block = 0; block < num_blocks; block++) {
            int64_t row = num_rows * block / num_blocks, end = num_rows * (block + 1) / num_blocks;
            multiply_some<MOST_ROWS, W>((int)(end - row), x + row * depth + first, depth, weights + first * PANEL, size,
                                        out + row * out_stride, out_stride, first > 0);
        }
    }
}

// Panels first to last of x W^T for at most ROW_CHUNK rows, times the scales [O] of its columns if there are any.
template <class W>
void multiply_panels(const float* x, const W* packed, const float* scales, float* out, int64_t num_rows, int64_t depth,
                     int64_t width, int64_t first, int64_t last) {
    constexpr int ABREAST = 4;  // panels of a single row: enough sums to hide the time that each addition takes
    alignas(64) float room[ROW_CHUNK * PANEL];
    for (int64_t panel = first; panel < last;) {
        int64_t column = panel * PANEL, columns = std::min<int64_t>(PANEL, width - column);
        const W* weights = packed + panel * depth * PANEL;
        if (num_rows == 1 && panel + ABREAST <= last && column + ABREAST * PANEL <= width) {
            multiply<1, ABREAST, W>(x, 0, weights, depth * PANEL, depth, out + column, 0, false);
            columns = ABREAST * PANEL;
        } else if (columns == PANEL) {
            multiply_panel(x, weights, out + column, num_rows, depth, width);
        } else {
            multiply_panel(x, weights, room, num_rows, depth, PANEL);
            for (int64_t r = 0; r < num_rows; r++)
                std::copy(room + r * PANEL, room + r * PANEL + columns, out + r * width + column);
        }
        if (scales)
            for (int64_t r = 0; r < num_rows; r++)
                for (int64_t c = column; c < column + columns; c++) out[r * width + c] *= scales[c];
        panel += (columns + PANEL - 1) / PANEL;
    }
}

// A layer's weight: `kind` is 0 float32, 1 float16, 2 bfloat16, 3 int8.
struct Weight {
    int64_t kind, width, depth;
    const void* packed;
    const float *scales, *bias;  // [width] or null

    int64_t panels() const { return (width + PANEL - 1) / PANEL; }
};

// Panels first to last of x W^T, plus the bias of their columns, for any number of rows; by one thread.
inline void multiply_part(const Weight& w, const float* x, float* out, int64_t num_rows, int64_t first, int64_t last) {
    for (int64_t row = 0; row < num_rows; row += ROW_CHUNK) {
        int64_t count = std::min(ROW_CHUNK, num_rows - row);
        const float* from = x + row * w.depth;
        float* to = out + row * w.width;
        auto of = [&](auto* packed) { multiply_panels(from, packed, w.scales, to, count, w.depth, w.width, first, last); };
        if (w.kind == 0) of((const float*)w.packed);
        if (w.kind == 1) of((const Half*)w.packed);
        if (w.kind == 2) of((const Bfloat*)w.packed);
        if (w.kind == 3) of((const int8_t*)w.packed);
    }
    if (w.bias)
        for (int64_t row = 0; row < num_rows; row++)
            for (int64_t i = first * PANEL; i < std::min(last * PANEL, w.width); i++) out[row * w.width + i] += w.bias[i];
}

// x W^T; to be called by all threads of a team.
inline void linear(const Weight& w, const float* x, float* out, int64_t num_rows) {
    int64_t num_parts = std::min<int64_t>(8 * omp_get_num_threads(), (w.panels() + 3) / 4);
#pragma omp for schedule(dynamic)
    for (int64_t part = 0; part < num_parts; part++)
        multiply_part(w, x, out, num_rows, w.panels() * part / num_parts, w.panels() * (part + 1) / num_parts);
}

template <class W>
void pack(const W* weight, W* packed, int64_t width, int64_t depth) {
    int64_t num_panels = (width + PANEL - 1) / PANEL;
#pragma omp parallel for
    for (int64_t panel = 0; panel < num_panels; panel++)
        for (int64_t column = 0; column < PANEL; column++) {
            int64_t row = panel * PANEL + column;
            W* to = packed + panel * depth * PANEL + column;
            for (int64_t k = 0; k < depth; k++) to[k * PANEL] = row < width ? weight[row * depth + k] : W{};
        }
}
