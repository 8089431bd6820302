// Keys in 4 bits, and their products with queries rounded to 7 bits. No sum of a tile's products overflows 16 bits within
// `SEGMENT` fours of components, which lets CPUs without 8-bit dot products add them up in half the space.
#pragma once

#include "amx.hpp"
#include "states.hpp"

#include <algorithm>

#if defined(__aarch64__)
#include "neon.hpp"
#endif

namespace HFS {

#if defined(__aarch64__)
using neon::JOINED, neon::SHARING, neon::add_products;
#else
constexpr int JOINED = 4, SHARING = 1; // components of a key that lie together, unpacked; queries that share a register
#endif

// Keys of one sequence and head. A tile holds TILE neighbouring keys, as (dim / 8, TILE, 4) bytes: four components of
// every key lie together in the low halves of the bytes, and the next four in the high ones. A half is 8 + component /
// scale, rounded. Scales: (tiles, TILE).
struct Codes {
    uint8_t *bytes;
    float *scales;
};

// The same for (batch, kv_heads): strides in bytes and in floats.
struct QuantisedKeys {
    uint8_t *bytes;
    float *scales;
    int64_t batch_bytes, head_bytes, batch_scales, head_scales;

    Codes of(int64_t batch, int64_t head) const {
        return {bytes + batch * batch_bytes + head * head_bytes, scales + batch * batch_scales + head * head_scales};
    }
};

constexpr int32_t QUERY_MOST = 63; // largest component of a rounded query
constexpr int64_t SEGMENT = 16;    // 2 * SEGMENT * 15 * QUERY_MOST < 2^15

constexpr int64_t BYTES_AHEAD = 2048; // bytes of codes that are prefetched before they are unpacked

// Keys of the tiles in [from, to), a byte for each component: (to - from, dim / JOINED, TILE, JOINED).
inline void unpack(const Codes &codes, int64_t dim, int64_t from, int64_t to, uint8_t *out) {
    const uint8_t *bytes = codes.bytes + from * TILE * dim / 2;
    const int64_t count = (to - from) * dim / 8;
    for (int64_t i = 0; i < count; i++, bytes += TILE * 4, out += 2 * TILE * 4) {
        __builtin_prefetch(bytes + BYTES_AHEAD);
#if defined(__aarch64__)
        neon::unpack(bytes, out);
#else
        for (int j = 0; j < TILE * 4; j++) out[j] = bytes[j] & 15, out[TILE * 4 + j] = bytes[j] >> 4;
#endif
    }
}

// Tiles whose products are found side by side: with few queries, one tile's would wait for each other.
template <int count> constexpr int tiles_together() {
    const int room = LANES >= 16 ? 16 : 8;
    return count * PARTS * 4 <= room ? 4 : count * PARTS * 2 <= room ? 2 : 1;
}

#if !defined(__aarch64__)
// Add the products of `tiles` tiles, each (fours, TILE, 4), with `count` queries, (fours, count, 4), to `sums`.
template <int count, int tiles>
inline void add_products(const uint8_t *keys, const int8_t *queries, int64_t fours, Ints (*sums)[count][PARTS]) {
    const auto key_at = [&](int tile, int64_t i) { return keys + (tile * fours + i) * TILE * 4; };
    const auto query_at = [&](int64_t i, int p) {
        int32_t word;
        std::memcpy(&word, queries + (i * count + p) * 4, 4);
        return word;
    };
#if defined(__AVX512F__) && defined(__AVX512BW__)
    for (int64_t i = 0; i < fours; i++)
        for (int t = 0; t < tiles; t++) {
            const __m512i key = _mm512_loadu_si512(key_at(t, i));
            for (int p = 0; p < count; p++) {
                const __m512i query = _mm512_set1_epi32(query_at(i, p));
#if defined(__AVX512VNNI__)
                sums[t][p][0] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[t][p][0], key, query);
#else
                const __m512i twos = _mm512_maddubs_epi16(key, query);
                sums[t][p][0] += (Ints)_mm512_madd_epi16(twos, _mm512_set1_epi16(1));
#endif
            }
        }
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    for (int64_t i = 0; i < fours; i++)
        for (int t = 0; t < tiles; t++) {
            const __m256i *at = reinterpret_cast<const __m256i *>(key_at(t, i));
            const __m256i low = _mm256_loadu_si256(at), high = _mm256_loadu_si256(at + 1);
            for (int p = 0; p < count; p++) {
                const __m256i query = _mm256_set1_epi32(query_at(i, p));
                sums[t][p][0] = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums[t][p][0], low, query);
                sums[t][p][1] = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums[t][p][1], high, query);
            }
        }
#elif defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t from = 0; from < fours; from += SEGMENT) {
        __m256i halves[tiles][count][2];
        for (int t = 0; t < tiles; t++)
            for (int p = 0; p < count; p++) halves[t][p][0] = halves[t][p][1] = _mm256_setzero_si256();
        for (int64_t i = from; i < std::min(from + SEGMENT, fours); i++)
            for (int t = 0; t < tiles; t++) {
                const __m256i *at = reinterpret_cast<const __m256i *>(key_at(t, i));
                const __m256i low = _mm256_loadu_si256(at), high = _mm256_loadu_si256(at + 1);
                for (int p = 0; p < count; p++) {
                    const __m256i query = _mm256_set1_epi32(query_at(i, p));
                    halves[t][p][0] = _mm256_add_epi16(halves[t][p][0], _mm256_maddubs_epi16(low, query));
                    halves[t][p][1] = _mm256_add_epi16(halves[t][p][1], _mm256_maddubs_epi16(high, query));
                }
            }
        for (int t = 0; t < tiles; t++)
            for (int p = 0; p < count; p++)
                for (int part = 0; part < 2; part++)
                    sums[t][p][part] += (Ints)_mm256_madd_epi16(halves[t][p][part], ones);
    }
#else
    for (int64_t i = 0; i < fours; i++)
        for (int t = 0; t < tiles; t++)
            for (int part = 0; part < PARTS; part++) {
                Words key;
                std::memcpy(&key, key_at(t, i) + part * LANES * 4, sizeof key);
                for (int p = 0; p < count; p++)
                    for (int j = 0; j < 4; j++)
                        sums[t][p][part] += (Ints)((key >> (8 * j)) & 255u) * int32_t(queries[(i * count + p) * 4 + j]);
            }
#endif
}
#endif

// The Hadamard transform of a vector of `dim` components, a multiple of 8, before it is rounded: it leaves products of
// keys and queries as they are, but for a factor, and spreads components that are much larger than others. The halves
// are added and subtracted, and blocks of each transformed whose size is the largest power of two that divides a half.
// Gives that factor.
inline float mix(const float *from, int64_t dim, float *out) {
    const int64_t half = dim / 2, size = half & -half;
    for (int64_t i = 0; i < half; i++) {
        out[i] = from[i] + from[half + i];
        out[half + i] = from[i] - from[half + i];
    }
    for (int64_t step = 1; step < size; step *= 2)
        for (int64_t block = 0; block < dim; block += 2 * step)
            for (int64_t i = block; i < block + step; i++) {
                const float low = out[i], high = out[i + step];
                out[i] = low + high;
                out[i + step] = low - high;
            }
    return float(2 * size);
}

// `count` queries, rounded. Scores are to the base 2: exp(score) = 2^(what `scores` gives).
template <int count> struct RoundedQueries {
    int64_t dim;
    static constexpr int rows = (count + SHARING - 1) / SHARING * SHARING;
    std::vector<int8_t> parts; // (dim / JOINED, rows, JOINED)
    float scales[count];
    int32_t offsets[count]; // cancels the 8 that is added to each component of a key
    std::vector<int8_t> turned; // (count, dim), where a matrix unit multiplies

    // `query_of(i)`: query i, scaled, or nullptr for none.
    template <typename QueryOf> RoundedQueries(int64_t dim, QueryOf query_of) : dim(dim), parts(dim * rows) {
        float *query = scratch<float, 25>(dim);
        for (int p = 0; p < count; p++) {
            const float *given = query_of(p);
            const float gain = given ? mix(given, dim, query) : 1;
            float most = 0;
            for (int64_t i = 0; given && i < dim; i++) most = std::max(most, std::fabs(query[i]));
            const float inverse = most > 0 ? QUERY_MOST / most : 0.0f;
            scales[p] = most / QUERY_MOST * LOG2_E / gain;
            int32_t total = 0;
            for (int64_t i = 0; i < dim; i++) {
                const float exact = given ? std::nearbyint(query[i] * inverse) : 0.0f;
                const int32_t part = std::fabs(exact) <= QUERY_MOST ? int32_t(exact) : 0; // 0 for NaN
                total += part;
                parts[(i / JOINED * rows + p) * JOINED + i % JOINED] = int8_t(part);
            }
            offsets[p] = -8 * total;
        }
        if (!by_matrix_unit(dim)) return;
        turned.resize(count * dim);
        for (int64_t i = 0; i < dim; i++)
            for (int p = 0; p < count; p++) turned[p * dim + i] = parts[(i / JOINED * rows + p) * JOINED + i % JOINED];
    }

    static bool by_matrix_unit([[maybe_unused]] int64_t dim) {
#if defined(HFS_AMX)
        return count == amx::ROWS && dim % amx::BYTES == 0;
#else
        return false;
#endif
    }

    // Scores for the keys of unpacked tiles, still to be multiplied by `scales[p]`.
    template <int tiles> void unscaled(const uint8_t *keys, const float *key_scales, Floats (*out)[count][PARTS]) const {
        Ints sums[tiles][count][PARTS];
        for (int t = 0; t < tiles; t++)
            for (int p = 0; p < count; p++)
                for (int part = 0; part < PARTS; part++) sums[t][p][part] = Ints{} + offsets[p];
        add_products<count, tiles>(keys, parts.data(), dim / JOINED, sums);
        for (int t = 0; t < tiles; t++)
            for (int part = 0; part < PARTS; part++) {
                const Floats scale = load(key_scales + t * TILE + part * LANES);
                for (int p = 0; p < count; p++)
                    out[t][p][part] = __builtin_convertvector(sums[t][p][part], Floats) * scale;
            }
    }
};

} // namespace HFS
