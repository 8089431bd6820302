// Vectors of as many numbers as a register of the CPU holds, in the vector extensions that GCC and Clang share. (GCC
// handles longer vectors number by number.) Few instructions are needed by name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hfs {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int SHARING = 16; // pairs whose sums fit into the registers beside the shared keys
constexpr int VOTERS = 16;  // the same where keys are in 4 bits
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int SHARING = 6;
constexpr int VOTERS = 4;
#else
constexpr int LANES = 4;
constexpr int SHARING = 8;
constexpr int VOTERS = 4;
#endif
constexpr int TILE = 16;             // keys whose codes of 4 bits lie together, on every CPU
constexpr int PARTS = TILE / LANES; // registers for one number of each
constexpr float LOG2_E = 1.44269504f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline Floats load(const float *from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline void store(float *to, Floats x) { std::memcpy(to, &x, sizeof x); }

inline void store(int32_t *to, Ints x) { std::memcpy(to, &x, sizeof x); }

// Booleans: bytes of 1 and 0, or lanes of all bits and none.
inline Bytes load_bytes(const uint8_t *from) {
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

inline Ints from_bytes(const uint8_t *from) { return __builtin_convertvector(load_bytes(from), Ints) != 0; }

inline void store_bytes(uint8_t *to, Ints yes) {
    const Bytes bytes = __builtin_convertvector(yes & 1, Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
}

inline Floats all(float x) { return x - Floats{}; } // adding 0 would take an instruction, for the sake of -0

#if defined(__AVX512F__)
// One instruction each, which compilers do not use for a conditional.
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }

inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#else
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

inline float sum(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float out = 0;
    for (int i = 0; i < LANES; i++) out += x[i];
    return out;
#endif
}

inline float highest(Floats x) {
    float out = x[0];
    for (int i = 1; i < LANES; i++) out = x[i] > out ? x[i] : out;
    return out;
}

inline int sum(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int out = 0;
    for (int i = 0; i < LANES; i++) out += x[i];
    return out;
#endif
}

// A bit for each lane that is true.
inline uint32_t bits(Ints yes) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)yes, (__m512i)yes);
#else
    uint32_t out = 0;
    for (int i = 0; i < LANES; i++) out |= uint32_t(yes[i] & 1) << i;
    return out;
#endif
}

inline Ints counting() {
    Ints out;
    for (int i = 0; i < LANES; i++) out[i] = i;
    return out;
}

inline Ints counting(int64_t from) { return counting() + int32_t(from); }

inline float from_word(uint32_t word) {
    float out;
    std::memcpy(&out, &word, sizeof out);
    return out;
}

// A float16 has 5 bits of exponent where a float has 8: its bits in a float's place lack a factor of 2^112.
inline float from_float16(uint16_t half) {
    const float size = from_word(uint32_t(half & 0x7fff) << 13) * 0x1p112f;
    const float out = (half & 0x7c00) == 0x7c00 ? from_word(0x7f800000u | uint32_t(half & 0x3ff) << 13) : size;
    return half & 0x8000 ? -out : out;
}

// bfloat16 is the upper half of a float.
inline Floats from_halves(const uint16_t *from) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
    Halves half;
    std::memcpy(&half, from, sizeof half);
    return (Floats)(__builtin_convertvector(half, Words) << 16);
#endif
}

inline void store_halves(uint16_t *to, Floats x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), _mm512_cvtepi32_epi16((__m512i)((Words)x >> 16)));
#else
    const Halves half = __builtin_convertvector((Words)x >> 16, Halves);
    std::memcpy(to, &half, sizeof half);
#endif
}

// 2^x for x in [-126, 127]: below, 2^-126. The power of two goes into the exponent's bits; the polynomial (least maximal
// relative error on [-1/2, 1/2]) is good to 8e-5 (rough) or 1e-7.
template <bool rough> inline Floats exp2(Floats x) {
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer.
    x = larger(x, all(-126.0f));
    Floats shifted = x + shift;
    Floats part = x - (shifted - shift);
    Floats power;
    if (rough) {
        power = part * 0.0551714356f + 0.24261081f;
        power = power * part + 0.693260991f;
        power = power * part + 0.999928093f;
    } else {
        power = part * 0.00132764546f + 0.00967554037f;
        power = power * part + 0.0555071331f;
        power = power * part + 0.240221197f;
        power = power * part + 0.693146967f;
        power = power * part + 1.0f;
    }
    return (Floats)((Ints)power + ((Ints)shifted << 23));
}

// About 2^x for x = y / 2^23 - 127 below 128, with an error of up to 6 %: y as the bits of a float (Schraudolph, "A
// Fast, Compact Approximation of the Exponential Function", 1999). Enough to rank by.
constexpr float BIAS = 127.0f, UNIT = 8388608.0f; // of the exponent; 2^23
inline Floats rough_exp2(Floats y) {
    return (Floats)__builtin_convertvector(larger(y, Floats{}), Ints);
}

// cap * tanh(x / cap), with tanh(y) = 1 - 2 / (exp(2 y) + 1).
inline Floats capped(Floats x, float cap) {
    const Floats power = exp2<false>(smaller(x * (2 * LOG2_E / cap), all(64.0f)));
    return cap - 2 * cap / (power + 1.0f);
}

// For each key of a tile, the product of its components, unsigned bytes, with those of a query, signed ones: four
// components at a time, `left` (LANES, 4) and `right` (4) of the type `Part`.
#if defined(__AVX2__) && !defined(__AVX512F__)
class Products {
  public:
    typedef int16_t Part;
    void add(const uint8_t *left, const Part *right) {
        int64_t word;
        std::memcpy(&word, right, sizeof word);
        const __m256i parts = _mm256_set1_epi64x(word);
        low = _mm256_add_epi32(low, _mm256_madd_epi16(widened(left), parts));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(widened(left + 16), parts));
    }
    // Each key has two sums, next to each other; adding neighbours leaves keys in the order 0, 1, 4, 5, 2, 3, 6, 7.
    Ints total() const { return (Ints)_mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0b11011000); }

  private:
    __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();

    static __m256i widened(const uint8_t *bytes) {
        return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(bytes)));
    }
};
#else
class Products {
  public:
    typedef int8_t Part;
    void add(const uint8_t *left, const Part *right) {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        int32_t word;
        std::memcpy(&word, right, sizeof word);
        sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_loadu_si512(left), _mm512_set1_epi32(word));
#else
        Words bytes;
        std::memcpy(&bytes, left, sizeof bytes);
        for (int i = 0; i < 4; i++) sums += (Ints)((bytes >> (8 * i)) & 255u) * int32_t(right[i]);
#endif
    }
    Ints total() const { return sums; }

  private:
    Ints sums{};
};
#endif

} // namespace hfs
