// Queries in 8 bits, and their products with quantised keys.
#pragma once

#include "states.hpp"

#include <algorithm>

namespace hfs {

// Up to `count` queries, quantised. Scores are to the base 2: exp(score) = 2^(what `scores` gives).
template <int count> struct QuantisedQueries {
    int64_t dim;
    std::vector<Products::Part> parts; // (dim / 4, count, 4)
    float scales[count];
    int32_t offsets[count]; // cancels the 128 that is added to each byte of a key

    // `query_of(i)`: query i, scaled, or nullptr for none.
    template <typename QueryOf> QuantisedQueries(int64_t dim, QueryOf query_of) : dim(dim), parts(dim * count) {
        for (int p = 0; p < count; p++) {
            const float *query = query_of(p);
            float most = 0;
            for (int64_t i = 0; query && i < dim; i++) most = std::max(most, std::fabs(query[i]));
            const float inverse = most > 0 ? 127.0f / most : 0.0f;
            scales[p] = most / 127.0f * LOG2_E;
            int32_t total = 0;
            for (int64_t i = 0; i < dim; i += 4) {
                for (int64_t j = 0; j < 4; j++) {
                    const int32_t part = query ? int32_t(std::nearbyint(query[i + j] * inverse)) : 0;
                    total += part;
                    parts[i * count + p * 4 + j] = Products::Part(part);
                }
            }
            offsets[p] = -128 * total;
        }
    }

    // Scores of all queries for the keys of a tile.
    void scores(const Tiles &tiles, int64_t tile, Floats *out) const {
        Products sums[count];
        const uint8_t *bytes = tiles.bytes + tile * LANES * dim;
        for (int64_t i = 0; i < dim / 4; i++)
            for (int p = 0; p < count; p++) sums[p].add(bytes + i * LANES * 4, parts.data() + (i * count + p) * 4);
        const Floats scale = load(tiles.scales + tile * LANES);
        for (int p = 0; p < count; p++)
            out[p] = __builtin_convertvector(sums[p].total() + offsets[p], Floats) * scale * scales[p];
    }
};

// The weights of the positions of `tile` that lie in [low, high), 0 for the others.
inline Floats within(Floats weights, int64_t tile, int64_t low, int64_t high) {
    if (tile * LANES >= low && (tile + 1) * LANES <= high) return weights;
    const Ints position = counting() + int32_t(tile * LANES);
    return (Floats)((Ints)weights & (position >= int32_t(low)) & (position < int32_t(high)));
}

} // namespace hfs
