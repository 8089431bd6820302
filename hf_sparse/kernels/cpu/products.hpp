// Products of queries, rounded to 7 bits, with keys in 4 bits. No sum of a tile's products overflows 16 bits within
// `SEGMENT` quarters of a row, which lets CPUs without 8-bit dot products add them up in half the space.
#pragma once

#include "states.hpp"

#include <algorithm>

namespace hfs {

constexpr int32_t QUERY_MOST = 63; // largest component of a rounded query
constexpr int64_t SEGMENT = 16;    // 2 * SEGMENT * 15 * QUERY_MOST < 2^15

// Keys of the tiles in [from, to), a byte for each component: (to - from, dim / 4, TILE, 4).
inline void unpack(const Codes &codes, int64_t dim, int64_t from, int64_t to, uint8_t *out) {
    const uint8_t *bytes = codes.bytes + from * TILE * dim / 2;
    const int64_t count = (to - from) * dim / 8;
    for (int64_t i = 0; i < count; i++, bytes += TILE * 4, out += 2 * TILE * 4)
        for (int j = 0; j < TILE * 4; j++) out[j] = bytes[j] & 15, out[TILE * 4 + j] = bytes[j] >> 4;
}

// Add the products of one tile, (quarters, TILE, 4), with `count` queries, (quarters, count, 4), to `sums`.
template <int count>
inline void add_products(const uint8_t *keys, const int8_t *queries, int64_t quarters, Ints (*sums)[PARTS]) {
    const auto four = [&](int64_t quarter, int p) {
        int32_t word;
        std::memcpy(&word, queries + (quarter * count + p) * 4, 4);
        return word;
    };
#if defined(__AVX512F__) && defined(__AVX512BW__)
    for (int64_t i = 0; i < quarters; i++) {
        const __m512i key = _mm512_loadu_si512(keys + i * TILE * 4);
        for (int p = 0; p < count; p++) {
            const __m512i query = _mm512_set1_epi32(four(i, p));
#if defined(__AVX512VNNI__)
            sums[p][0] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[p][0], key, query);
#else
            const __m512i pairs = _mm512_maddubs_epi16(key, query);
            sums[p][0] += (Ints)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
#endif
        }
    }
#elif defined(__AVXVNNI__)
    for (int64_t i = 0; i < quarters; i++) {
        const __m256i *at = reinterpret_cast<const __m256i *>(keys + i * TILE * 4);
        const __m256i low = _mm256_loadu_si256(at), high = _mm256_loadu_si256(at + 1);
        for (int p = 0; p < count; p++) {
            const __m256i query = _mm256_set1_epi32(four(i, p));
            sums[p][0] = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums[p][0], low, query);
            sums[p][1] = (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums[p][1], high, query);
        }
    }
#elif defined(__AVX2__)
    for (int64_t from = 0; from < quarters; from += SEGMENT) {
        __m256i short_sums[count][2];
        for (int p = 0; p < count; p++) short_sums[p][0] = short_sums[p][1] = _mm256_setzero_si256();
        for (int64_t i = from; i < std::min(from + SEGMENT, quarters); i++) {
            const __m256i *at = reinterpret_cast<const __m256i *>(keys + i * TILE * 4);
            const __m256i low = _mm256_loadu_si256(at), high = _mm256_loadu_si256(at + 1);
            for (int p = 0; p < count; p++) {
                const __m256i query = _mm256_set1_epi32(four(i, p));
                short_sums[p][0] = _mm256_add_epi16(short_sums[p][0], _mm256_maddubs_epi16(low, query));
                short_sums[p][1] = _mm256_add_epi16(short_sums[p][1], _mm256_maddubs_epi16(high, query));
            }
        }
        const __m256i ones = _mm256_set1_epi16(1);
        for (int p = 0; p < count; p++)
            for (int part = 0; part < 2; part++) sums[p][part] += (Ints)_mm256_madd_epi16(short_sums[p][part], ones);
    }
#else
    for (int64_t i = 0; i < quarters; i++)
        for (int part = 0; part < PARTS; part++) {
            Words key;
            std::memcpy(&key, keys + (i * PARTS + part) * LANES * 4, sizeof key);
            for (int p = 0; p < count; p++)
                for (int j = 0; j < 4; j++)
                    sums[p][part] += (Ints)((key >> (8 * j)) & 255u) * int32_t(queries[(i * count + p) * 4 + j]);
        }
#endif
}

// `count` queries, rounded. Scores are to the base 2: exp(score) = 2^(what `scores` gives).
template <int count> struct RoundedQueries {
    int64_t dim;
    std::vector<int8_t> parts; // (dim / 4, count, 4)
    float scales[count];
    int32_t offsets[count]; // cancels the 8 that is added to each component of a key

    // `query_of(i)`: query i, scaled, or nullptr for none.
    template <typename QueryOf> RoundedQueries(int64_t dim, QueryOf query_of) : dim(dim), parts(dim * count) {
        for (int p = 0; p < count; p++) {
            const float *query = query_of(p);
            float most = 0;
            for (int64_t i = 0; query && i < dim; i++) most = std::max(most, std::fabs(query[i]));
            const float inverse = most > 0 ? QUERY_MOST / most : 0.0f;
            scales[p] = most / QUERY_MOST * LOG2_E;
            int32_t total = 0;
            for (int64_t i = 0; i < dim; i++) {
                const int32_t part = query ? int32_t(std::nearbyint(query[i] * inverse)) : 0;
                total += part;
                parts[(i / 4 * count + p) * 4 + i % 4] = int8_t(part);
            }
            offsets[p] = -8 * total;
        }
    }

    // Scores for the keys of a tile, still to be multiplied by `scales[p]`.
    void unscaled(const uint8_t *keys, const float *key_scales, Floats (*out)[PARTS]) const {
        Ints sums[count][PARTS];
        for (int p = 0; p < count; p++)
            for (int part = 0; part < PARTS; part++) sums[p][part] = Ints{} + offsets[p];
        add_products<count>(keys, parts.data(), dim / 4, sums);
        for (int part = 0; part < PARTS; part++) {
            const Floats scale = load(key_scales + part * LANES);
            for (int p = 0; p < count; p++) out[p][part] = __builtin_convertvector(sums[p][part], Floats) * scale;
        }
    }
};

} // namespace hfs
