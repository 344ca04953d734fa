// All layers of a step in one go, by one team of threads that waits for itself and not for Python between the parts.
#pragma once

#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "pointwise.h"

struct Layer {
    const float *input_norm, *ffn_norm, *attention_post_norm, *ffn_post_norm;  // [D] or null
    Weight qkv, attention_out, gate_up, down;
    Experts experts;  // in place of the last two, where there are any
    HeadNorm head_norms[2];
    int64_t num_head_norms;
    const float* rotary;
    int64_t turned, window;
};

struct Model {
    const Layer* layers;
    const float* norm;  // [D]
    int64_t num_layers, width, num_heads, num_kv_heads, head_width, activation;
    float eps, scale, softcap, residual_multiplier;
};

struct Step {
    float* stream;  // [N][D]: the embeddings; changed
    float* out;  // [N][D]: hidden states after the last norm
    float* const *keys;  // of each layer
    float* const *values;
    const int64_t *positions, *slots;  // [N]
    const int32_t *tables, *lengths, *starts;
    int64_t num_rows, num_sequences, table_stride;
    float* room;  // [N] times the widths of what `run` keeps between a layer's parts
};

inline int64_t room_width(const Model& m) {
    int64_t attention = (3 * m.num_heads + 2 * m.num_kv_heads) * m.head_width, feed_forward = 0;
    for (int64_t i = 0; i < m.num_layers; i++)
        feed_forward = std::max(feed_forward, m.layers[i].gate_up.width + m.layers[i].down.depth + experts_room(m.layers[i].experts));
    return attention + m.width + feed_forward;
}

inline void feed_forward(const Layer& layer, Choice& choice, int64_t activation, const float* x, float* out,
                         int64_t num_rows, float* room) {
    if (layer.experts.number) return mix(layer.experts, choice, activation, x, out, num_rows, room);
    float* gated = room + num_rows * layer.gate_up.width;
    linear(layer.gate_up, x, room, num_rows);
    gate(room, gated, num_rows, layer.down.depth, activation);
    linear(layer.down, gated, out, num_rows);
}

inline void run(const Model& m, const Step& step) {
    int64_t n = step.num_rows, mixed_width = m.num_heads * m.head_width;
    float* qkv = step.room;
    float* queries = qkv + n * (m.num_heads + 2 * m.num_kv_heads) * m.head_width;
    float* mixed = queries + n * mixed_width;
    float* added = mixed + n * mixed_width;
    float* room = added + n * m.width;
    float* x = step.out;
    Attention attention = {queries, nullptr, nullptr, step.tables, step.lengths, step.starts, mixed,
                           step.num_sequences, step.table_stride, m.num_heads, m.num_kv_heads, m.head_width, 0,
                           m.scale, m.softcap};
    std::fill(mixed, mixed + n * mixed_width, 0.0f);
    std::vector<Tile> tiles = find_tiles(attention);
    Choice choice(m.layers[0].experts, n);
#pragma omp parallel firstprivate(attention)
    {
        Room own_room(m.head_width);
        if (m.layers[0].input_norm) {
            norm(step.stream, m.layers[0].input_norm, m.eps, x, n, m.width);
        } else {
#pragma omp single
            std::copy(step.stream, step.stream + n * m.width, x);
        }
        for (int64_t i = 0; i < m.num_layers; i++) {
            const Layer& layer = m.layers[i];
            const float* next_norm = i + 1 < m.num_layers ? m.layers[i + 1].input_norm : m.norm;
            linear(layer.qkv, x, qkv, n);
            rotate({layer.rotary, step.positions, step.slots, queries, step.keys[i], step.values[i], m.num_heads,
                    m.num_kv_heads, m.head_width, layer.turned},
                   layer.head_norms, layer.num_head_norms, m.eps, qkv, n);
            attention.keys = step.keys[i], attention.values = step.values[i], attention.window = layer.window;
            attend(attention, tiles, own_room);
            linear(layer.attention_out, mixed, added, n);
            add({layer.attention_post_norm, layer.ffn_norm, m.eps, m.residual_multiplier}, added, step.stream, x, n, m.width);
            feed_forward(layer, choice, m.activation, x, added, n, room);
            add({layer.ffn_post_norm, next_norm, m.eps, m.residual_multiplier}, added, step.stream, x, n, m.width);
        }
    }
}
