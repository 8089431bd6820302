// Exact scores of queries for keys at given positions.
#pragma once

#include "states.hpp"

namespace hfs {

// Keys at `positions` (a multiple of LANES of them), transposed in tiles of LANES keys: (count / LANES, dim, LANES).
inline void turn_keys(const States &key, int64_t batch, int64_t head, const int64_t *positions, int64_t count,
                      float *out) {
    const int64_t dim = key.dim;
    float *buffers = scratch<float, 1>(LANES * dim);
    for (int64_t i = 0; i < count; i += LANES) {
        const float *vectors[LANES];
        for (int j = 0; j < LANES; j++) vectors[j] = key.vector(batch, head, positions[i + j], buffers + j * dim);
        float *to = out + i * dim;
        for (int64_t c = 0; c < dim; c++)
            for (int j = 0; j < LANES; j++) to[c * LANES + j] = vectors[j][c];
    }
}

// Scores of `pairs` queries for transposed keys: out[p * stride + i] of key i.
template <int pairs>
void turned_scores(const float *const *queries, const float *turned, int64_t dim, int64_t count, float *out,
                   int64_t stride) {
    for (int64_t tile = 0; tile < count / LANES; tile++) {
        Floats sums[pairs] = {};
        const float *keys = turned + tile * LANES * dim;
        for (int64_t j = 0; j < dim; j++) {
            const Floats key = load(keys + j * LANES);
            for (int p = 0; p < pairs; p++) sums[p] += key * queries[p][j];
        }
        for (int p = 0; p < pairs; p++) store(out + p * stride + tile * LANES, sums[p]);
    }
}

// The same for few queries, from keys in place: entries `start` to `stop` - 1 of `positions`.
inline void few_scores(const States &key, int64_t batch, int64_t head, const float *const *queries, int64_t pairs,
                       const int64_t *positions, int64_t start, int64_t stop, float *out, int64_t stride) {
    const int64_t dim = key.dim;
    float *buffer = scratch<float, 1>(dim);
    for (int64_t i = start; i < stop; i++) {
        if (i + VECTORS_AHEAD < stop) key.prefetch(batch, head, positions[i + VECTORS_AHEAD]);
        const float *vector = key.vector(batch, head, positions[i], buffer);
        for (int64_t p = 0; p < pairs; p++) {
            Floats sums{};
            int64_t j = 0;
            for (; j + LANES <= dim; j += LANES) sums += load(vector + j) * load(queries[p] + j);
            float score = sum(sums);
            for (; j < dim; j++) score += vector[j] * queries[p][j];
            out[p * stride + i] = score;
        }
    }
}

} // namespace hfs
