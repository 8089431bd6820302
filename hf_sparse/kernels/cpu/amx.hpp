// Products by the matrix unit of Intel's server CPUs (AMX): of rounded queries and keys, and of attention with keys and
// values in bfloat16. Its queries and weights, which are floats, are taken as the sum of two bfloat16 numbers, so that
// nothing else is rounded.
#pragma once

#include "states.hpp"

#include <algorithm>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512BF16__)
#define HFS_AMX

namespace HFS {
namespace amx {

constexpr int64_t ROWS = 16;  // of a register: numbers of a column of products, too
constexpr int64_t INNER = 32; // bfloat16 numbers in a row, which one instruction multiplies and adds
constexpr int64_t BYTES = 64; // the same of bytes
constexpr int TOGETHER = 4;   // products that are found side by side

// All eight registers of a thread are 16 rows of 64 bytes while this lives.
class Registers {
  public:
    Registers() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shape;
        _tile_loadconfig(&shape);
    }
    ~Registers() { _tile_release(); }
    Registers(const Registers &) = delete;
    Registers &operator=(const Registers &) = delete;
};

// Matrices of bfloat16 numbers, as two terms of one sum: rows of `inner` numbers, a multiple of INNER.
struct Terms {
    const uint16_t *high, *low;
    int64_t inner;
};

// Write 16 floats as sums of two bfloat16 numbers.
inline void split(Floats x, uint16_t *high, uint16_t *low) {
    const __m256bh first = _mm512_cvtneps_pbh((__m512)x);
    const __m512 rest = _mm512_sub_ps((__m512)x, _mm512_cvtpbh_ps(first));
    const __m256bh second = _mm512_cvtneps_pbh(rest);
    std::memcpy(high, &first, sizeof first);
    std::memcpy(low, &second, sizeof second);
}

// Turn 16 rows of `size` words, of which `row_of(i)` is one: (inner / 2, 16, 2) with zeros beyond `size`, in rows that are
// `row` pairs apart.
template <typename RowOf> void turn(RowOf row_of, int64_t size, int64_t inner, uint16_t *out, int64_t row) {
    for (int64_t from = 0; from < inner; from += INNER) {
        const int64_t words = std::clamp<int64_t>(size - from, 0, INNER);
        const __mmask32 some = words == INNER ? ~__mmask32(0) : (__mmask32(1) << words) - 1;
        __m512i x[16], y[16];
        for (int i = 0; i < 16; i++) x[i] = _mm512_maskz_loadu_epi16(some, row_of(i) + from);
        for (int i = 0; i < 16; i += 2) {
            y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]), x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
            x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]), x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
        }
        // x[4 a + b] holds, in its quarter c, pair 4 c + b of the rows 4 a to 4 a + 3.
        for (int b = 0; b < 4; b++) {
            const __m512i low = _mm512_shuffle_i32x4(x[b], x[4 + b], 0x88);
            const __m512i high = _mm512_shuffle_i32x4(x[8 + b], x[12 + b], 0x88);
            const __m512i odd_low = _mm512_shuffle_i32x4(x[b], x[4 + b], 0xdd);
            const __m512i odd_high = _mm512_shuffle_i32x4(x[8 + b], x[12 + b], 0xdd);
            y[b] = _mm512_shuffle_i32x4(low, high, 0x88), y[8 + b] = _mm512_shuffle_i32x4(low, high, 0xdd);
            y[4 + b] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
            y[12 + b] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
        }
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + (from / 2 + i) * row * 2, y[i]);
    }
}

// The words of two rows of `size` side by side, (columns, 2), zeros beyond `size`; `columns` is a multiple of 16.
inline void interleave(const uint16_t *first, const uint16_t *second, int64_t size, int64_t columns, uint16_t *out) {
    for (int64_t i = 0; i < columns; i += 16) {
        const int64_t words = std::clamp<int64_t>(size - i, 0, 16);
        const __mmask16 some = words == 16 ? __mmask16(-1) : __mmask16((1 << words) - 1);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, first + i));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, second + i));
        _mm512_storeu_si512(out + i * 2, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// Add (or write, unless `adds`) ROWS rows of products, `columns` (a multiple of 16) floats wide and `row` floats apart.
// `right`: (left.inner / 2, columns, 2) with rows of `right_row` pairs, so that neighbours of a column lie together.
inline void multiply(const Terms &left, const uint16_t *right, int64_t right_row, int64_t columns, bool adds, float *out,
                     int64_t row) {
    const auto step = [&](int64_t inner) {
        _tile_loadd(4, left.high + inner, left.inner * 2);
        _tile_loadd(5, left.low + inner, left.inner * 2);
    };
    const auto part = [&](int64_t inner, int64_t column) { return right + (inner / 2 * right_row + column) * 2; };
    const int64_t apart = row * 4, right_apart = right_row * 4;
    int64_t column = 0;
    for (; column + 64 <= columns; column += 64) {
        float *to = out + column;
        if (adds) {
            _tile_loadd(0, to, apart); _tile_loadd(1, to + 16, apart);
            _tile_loadd(2, to + 32, apart); _tile_loadd(3, to + 48, apart);
        } else {
            _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        }
        for (int64_t inner = 0; inner < left.inner; inner += INNER) {
            step(inner);
            _tile_loadd(6, part(inner, column), right_apart);
            _tile_loadd(7, part(inner, column + 16), right_apart);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(0, 5, 6); _tile_dpbf16ps(1, 5, 7);
            _tile_loadd(6, part(inner, column + 32), right_apart);
            _tile_loadd(7, part(inner, column + 48), right_apart);
            _tile_dpbf16ps(2, 4, 6); _tile_dpbf16ps(3, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, to, apart); _tile_stored(1, to + 16, apart);
        _tile_stored(2, to + 32, apart); _tile_stored(3, to + 48, apart);
    }
    for (; column < columns; column += 16) {
        if (adds) {
            _tile_loadd(0, out + column, apart);
        } else {
            _tile_zero(0);
        }
        for (int64_t inner = 0; inner < left.inner; inner += INNER) {
            step(inner);
            _tile_loadd(6, part(inner, column), right_apart);
            _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(0, 5, 6);
        }
        _tile_stored(0, out + column, apart);
    }
}

// Sums of products of ROWS rounded queries, (ROWS, dim), with TOGETHER tiles of unpacked keys, each (dim / 4, 16, 4),
// added to `start` (ROWS, 16) for each: (TOGETHER, ROWS, 16). `dim` is a multiple of BYTES.
inline void add_products(const int8_t *queries, const uint8_t *keys, int64_t dim, const int32_t *start, int32_t *out) {
    _tile_loadd(0, start, 64);
    _tile_loadd(1, start, 64);
    _tile_loadd(2, start, 64);
    _tile_loadd(3, start, 64);
    for (int64_t i = 0; i < dim; i += BYTES, keys += BYTES * 16) {
        _tile_loadd(4, queries + i, dim);
        _tile_loadd(5, keys, 64);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(6, keys + dim * 16, 64);
        _tile_dpbsud(1, 4, 6);
        _tile_loadd(7, keys + 2 * dim * 16, 64);
        _tile_dpbsud(2, 4, 7);
        _tile_loadd(5, keys + 3 * dim * 16, 64);
        _tile_dpbsud(3, 4, 5);
    }
    _tile_stored(0, out, 64);
    _tile_stored(1, out + 256, 64);
    _tile_stored(2, out + 512, 64);
    _tile_stored(3, out + 768, 64);
}

} // namespace amx
} // namespace HFS
#endif
