// Exact scores of queries for keys at given columns.
#pragma once

#include "states.hpp"

namespace hfs {

// Keys at `columns` (a multiple of LANES of them), turned so that so many keys are side by side: (count / LANES,
// dim, LANES).
inline void turn_keys(const States &key, int64_t batch, int64_t head, const int64_t *columns, int64_t count, float *out) {
    const int64_t dim = key.dim;
    float *buffers = scratch<float, 1>(LANES * dim);
    for (int64_t i = 0; i < count; i += LANES) {
        const float *rows[LANES];
        for (int j = 0; j < LANES; j++) rows[j] = key.row(batch, head, columns[i + j], buffers + j * dim);
        float *to = out + i * dim;
        for (int64_t c = 0; c < dim; c++)
            for (int j = 0; j < LANES; j++) to[c * LANES + j] = rows[j][c];
    }
}

// Scores of `members` queries for turned keys: out[m * stride + column].
template <int members>
void turned_scores(const float *const *queries, const float *turned, int64_t dim, int64_t count, float *out,
                   int64_t stride) {
    for (int64_t tile = 0; tile < count / LANES; tile++) {
        Floats sums[members] = {};
        const float *keys = turned + tile * LANES * dim;
        for (int64_t j = 0; j < dim; j++) {
            const Floats key = load(keys + j * LANES);
            for (int m = 0; m < members; m++) sums[m] += key * queries[m][j];
        }
        for (int m = 0; m < members; m++) store(out + m * stride + tile * LANES, sums[m]);
    }
}

// The same for few queries, from the keys where they lie: columns `start` to `stop` - 1 of the list.
inline void few_scores(const States &key, int64_t batch, int64_t head, const float *const *queries, int64_t members,
                       const int64_t *columns, int64_t start, int64_t stop, float *out, int64_t stride) {
    const int64_t dim = key.dim;
    float *buffer = scratch<float, 1>(dim);
    for (int64_t i = start; i < stop; i++) {
        if (i + ROWS_AHEAD < stop) key.prefetch(batch, head, columns[i + ROWS_AHEAD]);
        const float *row = key.row(batch, head, columns[i], buffer);
        for (int64_t m = 0; m < members; m++) {
            Floats sums{};
            int64_t j = 0;
            for (; j + LANES <= dim; j += LANES) sums += load(row + j) * load(queries[m] + j);
            float score = sum(sums);
            for (; j < dim; j++) score += row[j] * queries[m][j];
            out[m * stride + i] = score;
        }
    }
}

} // namespace hfs
