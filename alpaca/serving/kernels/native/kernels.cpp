// What Python calls. All arrays are contiguous, and lengths are numbers of elements.
#include "network.h"

extern "C" {

int64_t panel_rows() { return PANEL; }
int64_t lanes() { return LANES; }

// weight [O, I] of a kind -> packed [ceil(O / PANEL), I, PANEL].
void pack_weight(int64_t kind, const void* weight, void* packed, int64_t width, int64_t depth) {
    if (kind == 0) pack((const float*)weight, (float*)packed, width, depth);
    if (kind == 1 || kind == 2) pack((const Half*)weight, (Half*)packed, width, depth);
    if (kind == 3) pack((const int8_t*)weight, (int8_t*)packed, width, depth);
}

// x [N, I] -> out [N, O].
void multiply_packed(const Weight* weight, const float* x, float* out, int64_t num_rows) {
#pragma omp parallel
    linear(*weight, x, out, num_rows);
}

void paged_attention(const float* queries, const float* keys, const float* values, const int32_t* tables,
                     const int32_t* lengths, const int32_t* starts, float* out, int64_t num_sequences,
                     int64_t table_stride, int64_t num_heads, int64_t num_kv_heads, int64_t width, int64_t window,
                     float scale, float softcap) {
    Attention attention = {queries, keys, values, tables, lengths, starts, out, num_sequences, table_stride, num_heads,
                           num_kv_heads, width, window, scale, softcap};
    std::vector<Tile> tiles = find_tiles(attention);
#pragma omp parallel
    {
        Room room(width);
        attend(attention, tiles, room);
    }
}

void rotate_and_store(float* qkv, const float* table, const int64_t* positions, const int64_t* slots, float* queries,
                      float* keys, float* values, int64_t num_rows, int64_t num_heads, int64_t num_kv_heads,
                      int64_t width, int64_t turned) {
    Rotation rotation = {table, positions, slots, queries, keys, values, num_heads, num_kv_heads, width, turned};
#pragma omp parallel if (num_rows > 4)
    rotate(rotation, nullptr, 0, 0, qkv, num_rows);
}

void rms_norm(const float* x, const float* weight, float* out, int64_t num_rows, int64_t width, float eps) {
#pragma omp parallel if (num_rows > 4)
    norm(x, weight, eps, out, num_rows, width);
}

// stream += x; out = the stream's norm.
void add_rms_norm(float* x, const float* weight, float* stream, float* out, int64_t num_rows, int64_t width, float eps) {
    Addition addition = {nullptr, weight, eps, 1};
#pragma omp parallel if (num_rows > 4)
    add(addition, x, stream, out, num_rows, width);
}

// activation: 0 silu, 1 gelu, 2 gelu by tanh.
void activate_and_multiply(const float* gate_up, float* out, int64_t num_rows, int64_t width, int64_t activation) {
#pragma omp parallel if (num_rows > 4)
    gate(gate_up, out, num_rows, width, activation);
}

int64_t step_room(const Model* model) { return room_width(*model); }
void run_step(const Model* model, const Step* step) { run(*model, *step); }

}  // extern "C"
