// A feed-forward of experts: a router chooses some for each row, and each expert computes all its rows at once.
#pragma once

#include <algorithm>
#include <vector>

#include "linear.h"
#include "pointwise.h"

struct Experts {
    Weight router;  // D -> E, float32
    const Weight *gate_up, *down;  // [E]: D -> 2F, F -> D
    int64_t number, per_row, normalizes;
};

// The chosen (row, expert) pairs in order of the experts; shared by a team.
struct Choice {
    std::vector<int64_t> experts, places;  // [N][k]: each row's experts, best first, and where each pair stands
    std::vector<float> shares;  // [N][k]
    std::vector<int64_t> rows, starts;  // [N k]: the row of each pair; [E + 1]: each expert's first pair

    Choice(const Experts& e, int64_t num_rows)
        : experts(num_rows * e.per_row), places(num_rows * e.per_row), shares(num_rows * e.per_row),
          rows(num_rows * e.per_row), starts(e.number + 1) {}
};

// What is kept of N rows between the parts: floats of a row.
inline int64_t experts_room(const Experts& e) {
    return e.number ? e.router.width + e.per_row * (2 * e.router.depth + e.gate_up->width + e.down->depth) : 0;
}

// The k best of logits [E] as shares of a softmax; of equals the first. The logits are changed.
inline void choose(const Experts& e, float* logits, int64_t* experts, float* shares) {
    float most = *std::max_element(logits, logits + e.number), whole = 0, chosen = 0;
    for (int64_t i = 0; i < e.number; i++) whole += logits[i] = std::exp(logits[i] - most);
    for (int64_t k = 0; k < e.per_row; k++) {
        experts[k] = std::max_element(logits, logits + e.number) - logits;
        chosen += shares[k] = logits[experts[k]] / whole;
        logits[experts[k]] = -1;
    }
    if (e.normalizes)
        for (int64_t k = 0; k < e.per_row; k++) shares[k] /= chosen;
}

inline void order(const Experts& e, Choice& c) {
    std::fill(c.starts.begin(), c.starts.end(), 0);
    for (int64_t expert : c.experts) c.starts[expert + 1]++;
    for (int64_t i = 0; i < e.number; i++) c.starts[i + 1] += c.starts[i];
    std::vector<int64_t> next(c.starts.begin(), c.starts.end() - 1);
    for (size_t pair = 0; pair < c.experts.size(); pair++) {
        c.places[pair] = next[c.experts[pair]]++;
        c.rows[c.places[pair]] = pair / e.per_row;
    }
}

// Each expert's rows of x [N k][I], in order of the experts, times its weight.
inline void linear_of_each(const Weight* weights, const Choice& c, int64_t number, const float* x, float* out) {
    int64_t num_panels = weights->panels(), parts = std::min<int64_t>(4 * omp_get_num_threads(), (num_panels + 3) / 4);
#pragma omp for schedule(dynamic)
    for (int64_t at = 0; at < number * parts; at++) {
        int64_t expert = at / parts, part = at % parts, first = c.starts[expert], count = c.starts[expert + 1] - first;
        if (!count) continue;
        multiply_part(weights[expert], x + first * weights->depth, out + first * weights->width, count,
                      num_panels * part / parts, num_panels * (part + 1) / parts);
    }
}

// out [N][D]; to be called by all threads of a team.
inline void mix(const Experts& e, Choice& c, int64_t activation, const float* x, float* out, int64_t num_rows,
                float* room) {
    int64_t width = e.router.depth, pairs = num_rows * e.per_row;
    float* logits = room;
    float* gathered = logits + num_rows * e.router.width;
    float* outputs = gathered + pairs * width;
    float* gate_up = outputs + pairs * width;
    float* gated = gate_up + pairs * e.gate_up->width;
    linear(e.router, x, logits, num_rows);
#pragma omp single
    {
        for (int64_t row = 0; row < num_rows; row++)
            choose(e, logits + row * e.number, &c.experts[row * e.per_row], &c.shares[row * e.per_row]);
        order(e, c);
    }
#pragma omp for
    for (int64_t pair = 0; pair < pairs; pair++)
        std::copy(x + c.rows[pair] * width, x + (c.rows[pair] + 1) * width, gathered + pair * width);
    linear_of_each(e.gate_up, c, e.number, gathered, gate_up);
    gate(gate_up, gated, pairs, e.down->depth, activation);
    linear_of_each(e.down, c, e.number, gated, outputs);
#pragma omp for
    for (int64_t row = 0; row < num_rows; row++) {
        float* sum = out + row * width;
        std::fill(sum, sum + width, 0.0f);
        for (int64_t k = 0; k < e.per_row; k++) {
            const float* own = outputs + c.places[row * e.per_row + k] * width;
            Vec share = spread(c.shares[row * e.per_row + k]);
            for (int64_t i = 0; i < width; i += LANES)
                store(sum + i, multiply_add(share, load(own + i), load(sum + i)));
        }
    }
}
