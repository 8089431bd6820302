// Keys in 8 bits, with a scale of their own each: a quarter of float32's bytes, and whole-number products.

#include "states.hpp"

#include <algorithm>

using namespace hfs;

namespace {

// Vector `index` of `tiles`: what is at `row` over its scale, plus `shift`.
void write(const Tiles &tiles, int64_t index, const float *row, int64_t dim, float most, int shift) {
    const float highest = 255.0f - shift, inverse = most > 0 ? highest / most : 0.0f;
    tiles.scales[index] = most / highest;
    uint8_t *tile = tiles.bytes + index / LANES * LANES * dim + index % LANES * 4;
    for (int64_t i = 0; i < dim; i++)
        tile[i / 4 * LANES * 4 + i % 4] = uint8_t(shift + int32_t(std::nearbyint(row[i] * inverse)));
}

float largest(const float *row, int64_t dim) {
    float most = 0;
    for (int64_t i = 0; i < dim; i++) most = std::max(most, std::fabs(row[i]));
    return most;
}

// Mean and variance of the 16 keys of a tile.
void summarise(const States &key, const QuantisedKeys &out, int64_t batch, int64_t head, int64_t tile) {
    const int64_t dim = key.dim;
    float *buffer = scratch<float, 0>(3 * dim), *mean = buffer + dim, *variance = mean + dim;
    std::fill(mean, variance + dim, 0.0f);
    for (int64_t column = tile * LANES; column < (tile + 1) * LANES; column++) {
        const float *row = key.row(batch, head, column, buffer);
        for (int64_t i = 0; i < dim; i++) mean[i] += row[i], variance[i] += row[i] * row[i];
    }
    for (int64_t i = 0; i < dim; i++) {
        mean[i] /= LANES;
        variance[i] = std::max(0.0f, variance[i] / LANES - mean[i] * mean[i]);
    }
    write(out.means.of(batch, head), tile, mean, dim, largest(mean, dim), 128);
    write(out.variances.of(batch, head), tile, variance, dim, largest(variance, dim), 0);
}

} // namespace

// Quantise the keys from column `start` to `stop` - 1, and summarise the tiles that are complete with them.
extern "C" void hfs_quantise(const States *key, const QuantisedKeys *out, int64_t batches, int64_t heads,
                             int64_t start, int64_t stop, int64_t threads) {
    const int64_t dim = key->dim, step = 256, begin = start / step * step;
    const int64_t parts = (stop - begin + step - 1) / step;
    in_parallel(batches * heads * parts, threads, [&](int64_t task) {
        const int64_t part = task % parts, head = task / parts % heads, batch = task / parts / heads;
        const int64_t from = begin + part * step, to = std::min(stop, from + step);
        const Tiles tiles = out->keys.of(batch, head);
        float *buffer = scratch<float, 0>(3 * dim);
        for (int64_t column = std::max(start, from); column < to; column++) {
            const float *row = key->row(batch, head, column, buffer);
            write(tiles, column, row, dim, largest(row, dim), 128);
        }
        for (int64_t tile = std::max(start, from) / LANES; tile < to / LANES; tile++)
            summarise(*key, *out, batch, head, tile);
    });
}
