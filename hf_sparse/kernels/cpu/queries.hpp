// Queries in 8 bits, and their products with quantised keys.
#pragma once

#include "states.hpp"

#include <algorithm>

namespace hfs {

// Up to `count` queries, quantised; scores are wanted as powers of two, so that exp(score) is 2^(what is given here).
template <int count> struct QuantisedQueries {
    int64_t dim;
    std::vector<Products::Part> parts; // (dim / 4, count, 4)
    float scales[count];
    int32_t offsets[count]; // what the 128 in each byte of a key adds to a product

    // `rows(i)`: query i, already scaled, or nullptr for none.
    template <typename Rows> QuantisedQueries(int64_t dim, Rows rows) : dim(dim), parts(dim * count) {
        for (int m = 0; m < count; m++) {
            const float *row = rows(m);
            float most = 0;
            for (int64_t i = 0; row && i < dim; i++) most = std::max(most, std::fabs(row[i]));
            const float inverse = most > 0 ? 127.0f / most : 0.0f;
            scales[m] = most / 127.0f * LOG2_E;
            int32_t total = 0;
            for (int64_t i = 0; i < dim; i += 4) {
                for (int64_t j = 0; j < 4; j++) {
                    const int32_t part = row ? int32_t(std::nearbyint(row[i + j] * inverse)) : 0;
                    total += part;
                    parts[i * count + m * 4 + j] = Products::Part(part);
                }
            }
            offsets[m] = -128 * total;
        }
    }

    // Scores of all queries for the keys of a tile.
    void scores(const Tiles &tiles, int64_t tile, Floats *out) const {
        Products sums[count];
        const uint8_t *bytes = tiles.bytes + tile * LANES * dim;
        for (int64_t i = 0; i < dim / 4; i++)
            for (int m = 0; m < count; m++) sums[m].add(bytes + i * LANES * 4, parts.data() + (i * count + m) * 4);
        const Floats scale = load(tiles.scales + tile * LANES);
        for (int m = 0; m < count; m++)
            out[m] = __builtin_convertvector(sums[m].total() + offsets[m], Floats) * scale * scales[m];
    }
};

// 2^score for the lanes of `tile` that lie in [low, high), 0 for the others.
inline Floats within(Floats weights, int64_t tile, int64_t low, int64_t high) {
    if (tile * LANES >= low && (tile + 1) * LANES <= high) return weights;
    const Ints column = counting() + int32_t(tile * LANES);
    return (Floats)((Ints)weights & (column >= int32_t(low)) & (column < int32_t(high)));
}

} // namespace hfs
