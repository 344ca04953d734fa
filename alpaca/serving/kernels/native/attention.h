// Causal attention of packed queries over a paged cache.
//
// Keys and values lie as [B][K][KEYS][d]: what one head reads of a block is in one piece. They are taken CHUNK at a time,
// from fixed places: a query's result does not depend on what else is in the step.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "vectors.h"

constexpr int KEYS = 16;  // tokens of a block
constexpr int64_t CHUNK = 256;
constexpr int64_t TILE = 2 * MOST_ROWS;  // query rows that are computed together
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Attention {
    const float *queries, *keys, *values;  // [N][H][d] and the caches of one layer
    const int32_t *tables, *lengths, *starts;  // [S][table_stride], [S], [S + 1]
    float* out;  // [N][H][d]
    int64_t num_sequences, table_stride, num_heads, num_kv_heads, width, window;
    float scale, softcap;

    int64_t group() const { return num_heads / num_kv_heads; }
    int64_t num_rows(int64_t s) const { return (starts[s + 1] - starts[s]) * group(); }
};

// What one tile works in, kept from tile to tile.
struct Room {
    std::vector<float> queries, scores, sums;
    explicit Room(int64_t width) : queries(TILE * width), scores(TILE * CHUNK), sums(TILE * width) {}
};

// scores[ROWS][COUNT] = products of queries [ROWS][width] with COUNT keys [COUNT][width].
template <int ROWS, int COUNT>
inline void score_keys(const float* queries, const float* keys, int64_t width, float* scores) {
    Vec sums[ROWS][COUNT];
    for (auto& row : sums)
        for (auto& sum : row) sum = zero();
    for (int64_t k = 0; k < width; k += LANES) {
        Vec query[ROWS];
        for (int r = 0; r < ROWS; r++) query[r] = in_register(load(queries + r * width + k));
        for (int j = 0; j < COUNT; j++) {
            Vec key = load(keys + j * width + k);
            for (int r = 0; r < ROWS; r++) sums[r][j] = multiply_add(query[r], key, sums[r][j]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < COUNT; j += 4)
            store_sums(scores + r * CHUNK + j, sums[r][j], sums[r][j + 1], sums[r][j + 2], sums[r][j + 3]);
}

// A block of keys with some queries.
inline void score_block(int64_t num_rows, const float* queries, const float* keys, int64_t width, float* scores) {
    int64_t r = 0;
    for (; r + 3 <= num_rows; r += 3)
        for (int j = 0; j < KEYS; j += 4)
            score_keys<3, 4>(queries + r * width, keys + j * width, width, scores + r * CHUNK + j);
    for (; r < num_rows; r++)
        for (int j = 0; j < KEYS; j += 8)
            score_keys<1, 8>(queries + r * width, keys + j * width, width, scores + r * CHUNK + j);
}

// sums[ROWS][VECS * LANES] += weights[ROWS][count] times values, of which block b begins at values[b].
template <int ROWS, int VECS>
inline void add_values(const float* weights, const float* const* values, int64_t column, int64_t count, float* sums,
                       int64_t width) {
    Vec totals[ROWS][VECS];
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < VECS; i++) totals[r][i] = load(sums + r * width + column + i * LANES);
    for (int64_t at = 0; at < count; at++) {
        const float* value = values[at / KEYS] + at % KEYS * width + column;
        for (int i = 0; i < VECS; i++) {
            Vec part = in_register(load(value + i * LANES));
            for (int r = 0; r < ROWS; r++) totals[r][i] = multiply_add(spread(weights[r * CHUNK + at]), part, totals[r][i]);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < VECS; i++) store(sums + r * width + column + i * LANES, totals[r][i]);
}

template <int ROWS>
inline void add_some(int num_rows, const float* weights, const float* const* values, int64_t count, float* sums,
                     int64_t width) {
    if constexpr (ROWS > 0) {
        if (num_rows != ROWS) return add_some<ROWS - 1>(num_rows, weights, values, count, sums, width);
        constexpr int ABREAST = ROWS == 1 ? 8 : ROWS <= 3 ? 4 : 2;
        int64_t column = 0;
        for (; column + ABREAST * LANES <= width; column += ABREAST * LANES)
            add_values<ROWS, ABREAST>(weights, values, column, count, sums, width);
        for (; column < width; column += LANES) add_values<ROWS, 1>(weights, values, column, count, sums, width);
    }
}

// c * tanh(s / c) of scores [count], which is a multiple of LANES.
inline void cap(float* scores, int64_t count, float softcap) {
    for (int64_t i = 0; i < count; i += LANES) {
        Vec twice = load(scores + i) * spread(2 / softcap);
        Vec e = exponential(within(-40, twice, 40));
        store(scores + i, spread(softcap) - spread(2 * softcap) / (e + spread(1)));
    }
}

// A row's scores [count] become weights: e^(score - most), and 0 outside of first to last. Returns their sum.
inline float weigh(float* scores, int64_t count, int64_t first, int64_t last, float most) {
    std::fill(scores, scores + first, NOTHING);
    std::fill(scores + last, scores + count, NOTHING);
    Vec sum = zero();
    for (int64_t i = 0; i < count; i += LANES) {
        Vec weight = exponential(load(scores + i) - spread(most));
        store(scores + i, weight);
        sum = sum + weight;
    }
    std::fill(scores, scores + first, 0.0f);
    std::fill(scores + last, scores + count, 0.0f);
    return sum_of(sum);
}

// Rows first_row to first_row + num_rows of a sequence and a key head: row = query * group + head in the group.
inline void attend_tile(const Attention& a, Room& room, int64_t s, int64_t kv_head, int64_t first_row, int64_t num_rows) {
    int64_t group = a.group(), width = a.width, past = a.lengths[s] - (a.starts[s + 1] - a.starts[s]);
    auto place = [&](int64_t row) {
        return ((a.starts[s] + row / group) * a.num_heads + kv_head * group + row % group) * width;
    };
    auto end_of = [&](int64_t row) { return past + row / group + 1; };
    auto begin_of = [&](int64_t row) { return a.window ? std::max<int64_t>(0, end_of(row) - a.window) : 0; };
    float most[TILE], total[TILE];
    for (int64_t r = 0; r < num_rows; r++) {
        const float* query = a.queries + place(first_row + r);
        for (int64_t k = 0; k < width; k++) room.queries[r * width + k] = query[k] * a.scale;
        most[r] = NOTHING, total[r] = 0;
    }
    std::fill(room.sums.begin(), room.sums.begin() + num_rows * width, 0.0f);
    int64_t begin = begin_of(first_row) / KEYS * KEYS, end = end_of(first_row + num_rows - 1);
    for (int64_t chunk = begin / CHUNK * CHUNK; chunk < end; chunk += CHUNK) {
        // Of this chunk the blocks that some row sees: `from` is the first one's first key.
        int64_t from = std::max(begin, chunk), to = std::min(end, chunk + CHUNK), num_blocks = (to - from + KEYS - 1) / KEYS;
        const float* values[CHUNK / KEYS];
        for (int64_t b = 0; b < num_blocks; b++) {
            int64_t block = a.tables[s * a.table_stride + from / KEYS + b];
            int64_t place = (block * a.num_kv_heads + kv_head) * KEYS * width;
            values[b] = a.values + place;
            score_block(num_rows, room.queries.data(), a.keys + place, width, &room.scores[b * KEYS]);
        }
        for (int64_t r = 0; r < num_rows; r++) {
            float* scores = &room.scores[r * CHUNK];
            int64_t first = std::min(std::max<int64_t>(begin_of(first_row + r) - from, 0), num_blocks * KEYS);
            int64_t last = std::min(std::max(end_of(first_row + r) - from, first), num_blocks * KEYS);
            if (a.softcap != 0) cap(scores, num_blocks * KEYS, a.softcap);
            if (first == last) {
                std::fill(scores, scores + num_blocks * KEYS, 0.0f);
                continue;
            }
            float larger = std::max(most[r], *std::max_element(scores + first, scores + last));
            float kept = most[r] == NOTHING ? 0 : std::exp(most[r] - larger);
            total[r] = total[r] * kept + weigh(scores, num_blocks * KEYS, first, last, larger);
            if (kept != 1)
                for (int64_t k = 0; k < width; k++) room.sums[r * width + k] *= kept;
            most[r] = larger;
        }
        for (int64_t r = 0; r < num_rows; r += MOST_ROWS)
            add_some<MOST_ROWS>((int)std::min<int64_t>(MOST_ROWS, num_rows - r), &room.scores[r * CHUNK], values,
                                to - from, &room.sums[r * width], width);
    }
    for (int64_t r = 0; r < num_rows; r++)
        for (int64_t k = 0; k < width; k++)
            a.out[place(first_row + r) + k] = total[r] == 0 ? 0 : room.sums[r * width + k] / total[r];
}

struct Tile {
    int64_t sequence, kv_head, first_row, num_rows;
};

// The work of a step, in pieces small enough for all threads to have some.
inline std::vector<Tile> find_tiles(const Attention& a) {
    std::vector<Tile> tiles;
    int64_t num_rows = 0;
    for (int64_t s = 0; s < a.num_sequences; s++) num_rows += a.lengths[s] ? a.num_rows(s) * a.num_kv_heads : 0;
    int64_t size = std::max<int64_t>(1, std::min(TILE, num_rows / omp_get_max_threads()));
    for (int64_t s = 0; s < a.num_sequences; s++)
        for (int64_t kv_head = 0; a.lengths[s] && kv_head < a.num_kv_heads; kv_head++)
            for (int64_t row = 0; row < a.num_rows(s); row += size)
                tiles.push_back({s, kv_head, row, std::min(size, a.num_rows(s) - row)});
    return tiles;
}

// To be called by all threads of a team; `room` is the thread's own.
inline void attend(const Attention& a, const std::vector<Tile>& tiles, Room& room) {
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < tiles.size(); i++)
        attend_tile(a, room, tiles[i].sequence, tiles[i].kv_head, tiles[i].first_row, tiles[i].num_rows);
}
