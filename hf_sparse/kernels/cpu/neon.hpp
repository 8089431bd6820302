// Products of keys in 4 bits with rounded queries on ARM of 64 bits, for `codes.hpp`, by the best instructions that the CPU
// has: products of matrices (from ARM 8.6 on, as on Apple's M2 or Graviton 3), dot products (8.2), or neither. Codes are
// taken for signed numbers, which they fit into.
#pragma once

#include "vectors.hpp"

#include <algorithm>

namespace HFS::neon {

inline int8x16_t load(const void *from) { return vld1q_s8(static_cast<const int8_t *>(from)); }

// Components of a key that lie together, unpacked, and queries that share a register.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int JOINED = 8, SHARING = 2;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int JOINED = 4, SHARING = 4;
#else
constexpr int JOINED = 4, SHARING = 1;
#endif

// 64 bytes, (TILE, 4), of keys in 4 bits -> (8 / JOINED, TILE, JOINED).
inline void unpack(const uint8_t *bytes, uint8_t *out) {
    for (int i = 0; i < TILE * 4; i += 16) {
        const uint8x16_t four = vld1q_u8(bytes + i);
        const uint8x16_t low = vandq_u8(four, vdupq_n_u8(15)), high = vshrq_n_u8(four, 4);
        if (JOINED == 8) {
            const uint32x4_t a = vreinterpretq_u32_u8(low), b = vreinterpretq_u32_u8(high);
            vst1q_u8(out + 2 * i, vreinterpretq_u8_u32(vzip1q_u32(a, b)));
            vst1q_u8(out + 2 * i + 16, vreinterpretq_u8_u32(vzip2q_u32(a, b)));
        } else {
            vst1q_u8(out + i, low);
            vst1q_u8(out + TILE * 4 + i, high);
        }
    }
}

#if defined(__ARM_FEATURE_MATMUL_INT8)

// Add the products of `tiles` tiles, each (eights, TILE, 8), with `count` queries, (eights, rows, 2, 8), to `sums`. An
// instruction multiplies two keys by two queries; where there is one, the other is of zeros.
template <int count, int tiles>
[[gnu::always_inline]] inline void add_products(const uint8_t *keys, const int8_t *queries, int64_t eights,
                                                Ints (*sums)[count][PARTS]) {
    constexpr int rows = (count + 1) / 2;
    int32x4_t products[tiles][rows][TILE / 2];
    for (auto &tile : products)
        for (auto &row : tile)
            for (auto &part : row) part = vdupq_n_s32(0);
    for (int64_t i = 0; i < eights; i++) {
        int8x16_t query[rows];
        for (int r = 0; r < rows; r++) query[r] = load(queries + (i * rows + r) * 16);
        for (int t = 0; t < tiles; t++)
            for (int two = 0; two < TILE / 2; two++) {
                const int8x16_t key = load(keys + ((t * eights + i) * TILE + 2 * two) * 8);
                for (int r = 0; r < rows; r++) products[t][r][two] = vmmlaq_s32(products[t][r][two], query[r], key);
            }
    }
    for (int t = 0; t < tiles; t++)
        for (int p = 0; p < count; p++)
            for (int part = 0; part < PARTS; part++) {
                const int64x2_t one = vreinterpretq_s64_s32(products[t][p / 2][2 * part]);
                const int64x2_t other = vreinterpretq_s64_s32(products[t][p / 2][2 * part + 1]);
                const int64x2_t of_query = p % 2 ? vzip2q_s64(one, other) : vzip1q_s64(one, other);
                sums[t][p][part] += (Ints)vreinterpretq_s32_s64(of_query);
            }
}

#elif defined(__ARM_FEATURE_DOTPROD)

// Products of four keys with the queries of a register.
template <int count, int p = 0> void add_four(int8x16_t keys, int8x16_t queries, Ints *sums) {
    if constexpr (p < count) {
        sums[p * PARTS] = (Ints)vdotq_laneq_s32((int32x4_t)sums[p * PARTS], keys, queries, p);
        add_four<count, p + 1>(keys, queries, sums);
    }
}

// Add the products of `tiles` tiles, each (fours, TILE, 4), with `count` queries, (fours, 4, 4), to `sums`.
template <int count, int tiles>
[[gnu::always_inline]] inline void add_products(const uint8_t *keys, const int8_t *queries, int64_t fours,
                                                Ints (*sums)[count][PARTS]) {
    static_assert(count <= 4);
    for (int64_t i = 0; i < fours; i++) {
        const int8x16_t query = load(queries + i * 16);
        for (int t = 0; t < tiles; t++)
            for (int part = 0; part < PARTS; part++)
                add_four<count>(load(keys + ((t * fours + i) * PARTS + part) * 16), query, &sums[t][0][part]);
    }
}

#else

constexpr int64_t LONGEST = 32; // LONGEST * 15 * 63 < 2^15: so many products are added up in 16 bits

// Add the products of one tile, (fours, TILE, 4), with `count` queries, (count, 4) for each four, `stride` bytes apart.
template <int count>
void add_tile(const uint8_t *keys, const int8_t *queries, int64_t stride, int64_t fours, Ints (*sums)[PARTS]) {
    for (int64_t from = 0; from < fours; from += LONGEST) {
        int16x8_t products[count][PARTS][2]; // for two keys each, those of four components
        for (auto &of_query : products)
            for (auto &part : of_query) part[0] = part[1] = vdupq_n_s16(0);
        for (int64_t i = from; i < std::min(from + LONGEST, fours); i++) {
            int8x16_t query[count];
            for (int p = 0; p < count; p++) {
                int32_t word;
                std::memcpy(&word, queries + i * stride + p * 4, 4);
                query[p] = vreinterpretq_s8_s32(vdupq_n_s32(word));
            }
            for (int part = 0; part < PARTS; part++) {
                const int8x16_t key = load(keys + (i * PARTS + part) * 16);
                for (int p = 0; p < count; p++) {
                    int16x8_t *to = products[p][part];
                    to[0] = vmlal_s8(to[0], vget_low_s8(key), vget_low_s8(query[p]));
                    to[1] = vmlal_high_s8(to[1], key, query[p]);
                }
            }
        }
        for (int p = 0; p < count; p++)
            for (int part = 0; part < PARTS; part++) {
                const int16x8_t *of = products[p][part];
                sums[p][part] += (Ints)vpaddq_s32(vpaddlq_s16(of[0]), vpaddlq_s16(of[1]));
            }
    }
}

// Add the products of `tiles` tiles, each (fours, TILE, 4), with `count` queries, (fours, count, 4), to `sums`: for two
// queries at a time, whose sums fit into the registers.
template <int count, int tiles>
[[gnu::always_inline]] inline void add_products(const uint8_t *keys, const int8_t *queries, int64_t fours,
                                                Ints (*sums)[count][PARTS]) {
    for (int t = 0; t < tiles; t++) {
        const uint8_t *tile = keys + t * fours * TILE * 4;
        for (int p = 0; p + 2 <= count; p += 2) add_tile<2>(tile, queries + p * 4, count * 4, fours, sums[t] + p);
        if (count % 2) add_tile<1>(tile, queries + (count - 1) * 4, count * 4, fours, sums[t] + count - 1);
    }
}

#endif

} // namespace HFS::neon
