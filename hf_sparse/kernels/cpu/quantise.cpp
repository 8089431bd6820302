// Keys in 4 bits with one scale a key (symmetric, by the largest component): an eighth of float32's bytes, and products
// of small integers. They only rank keys; attention reads the keys themselves.

#include "codes.hpp"

using namespace HFS;

namespace {

constexpr int32_t HIGHEST = 7, ZERO = 8; // codes are 1 to 15

} // namespace

extern "C" int64_t HFS_NAME(lanes)() { return LANES; }

// Quantise the keys at positions `start` to `stop` - 1, less `center` (batches, heads, dim).
extern "C" void HFS_NAME(quantise)(const States *key, const QuantisedKeys *out, const float *center, int64_t batches,
                                   int64_t heads, int64_t start, int64_t stop, int64_t threads) {
    const int64_t dim = key->dim, step = 16 * TILE; // threads write whole tiles
    const int64_t origin = start / step * step, parts = (stop - origin + step - 1) / step;
    in_parallel(batches * heads * parts, threads, [&](int64_t task) {
        const int64_t part = task % parts, head = task / parts % heads, batch = task / parts / heads;
        const Codes codes = out->of(batch, head);
        float *buffer = scratch<float, 0>(dim), *vector = scratch<float, 1>(dim);
        const int64_t end = std::min(stop, origin + (part + 1) * step);
        for (int64_t position = std::max(start, origin + part * step); position < end; position++) {
            const float *whole = key->vector(batch, head, position, buffer);
            for (int64_t i = 0; i < dim; i++) buffer[i] = whole[i] - center[(batch * heads + head) * dim + i];
            mix(buffer, dim, vector);
            float most = 0;
            for (int64_t i = 0; i < dim; i++) most = std::max(most, std::fabs(vector[i]));
            codes.scales[position] = most / HIGHEST;
            const float inverse = most > 0 ? HIGHEST / most : 0.0f;
            uint8_t *tile = codes.bytes + position / TILE * TILE * dim / 2 + position % TILE * 4;
            for (int64_t i = 0; i < dim; i++) {
                const float part = std::nearbyint(vector[i] * inverse);
                const int32_t code = ZERO + (std::fabs(part) <= HIGHEST ? int32_t(part) : 0); // 0 for NaN
                uint8_t &byte = tile[i / 8 * TILE * 4 + i % 4];
                byte = i / 4 % 2 ? uint8_t((byte & 15) | code << 4) : uint8_t((byte & 240) | code);
            }
        }
    });
}
