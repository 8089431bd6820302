// Keys in 8 bits with one scale a key (symmetric absmax, as in LLM.int8(), arXiv 2208.07339): a quarter of float32's
// bytes, and integer products. They only rank keys; attention reads the keys themselves.

#include "states.hpp"

using namespace hfs;

extern "C" int64_t hfs_lanes() { return LANES; }

// Quantise the keys at positions `start` to `stop` - 1.
extern "C" void hfs_quantise(const States *key, const QuantisedKeys *out, int64_t batches, int64_t heads,
                             int64_t start, int64_t stop, int64_t threads) {
    const int64_t dim = key->dim, step = 256;
    const int64_t parts = (stop - start + step - 1) / step;
    in_parallel(batches * heads * parts, threads, [&](int64_t task) {
        const int64_t part = task % parts, head = task / parts % heads, batch = task / parts / heads;
        const Tiles tiles = out->of(batch, head);
        float *buffer = scratch<float, 0>(dim);
        const int64_t end = std::min(stop, start + (part + 1) * step);
        for (int64_t position = start + part * step; position < end; position++) {
            const float *vector = key->vector(batch, head, position, buffer);
            float most = 0;
            for (int64_t i = 0; i < dim; i++) most = std::max(most, std::fabs(vector[i]));
            const float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
            tiles.scales[position] = scale;
            uint8_t *tile = tiles.bytes + position / LANES * LANES * dim + position % LANES * 4;
            for (int64_t i = 0; i < dim; i++)
                tile[i / 4 * LANES * 4 + i % 4] = uint8_t(128 + int32_t(std::nearbyint(vector[i] * inverse)));
        }
    });
}
