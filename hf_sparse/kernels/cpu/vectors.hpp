// Vectors of as many numbers as a register of the CPU holds, in the vector extensions that GCC and Clang share. (GCC
// handles longer vectors number by number.) Few instructions are needed by name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Everything is compiled once for each target, see `dispatch.cpp`, in a namespace of its own, `HFS`, by which exported
// functions are named, too: the linker would take one target's function for all others of the same name.
#define HFS_JOINED(target, name) target##_##name
#define HFS_NAMED(target, name) HFS_JOINED(target, name)
#define HFS_NAME(name) HFS_NAMED(HFS, name)

namespace HFS {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int SET = 16; // pairs whose sums fit into the registers beside the keys
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int SET = 4;
#else
constexpr int LANES = 4;
constexpr int SET = 4;
#endif
constexpr int TILE = 16;             // keys whose codes of 4 bits lie together, on every CPU
constexpr int PARTS = TILE / LANES; // registers for one number of each
constexpr float LOG2_E = 1.44269504f;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

inline Floats load(const float *from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

inline Ints load(const int32_t *from) {
    Ints out;
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

inline Ints from_bytes(const uint8_t *from) {
#if defined(__aarch64__)
    uint32_t four;
    std::memcpy(&four, from, sizeof four);
    return (Ints)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))) != 0;
#else
    return __builtin_convertvector(load_bytes(from), Ints) != 0;
#endif
}

inline Floats all(float x) { return x - Floats{}; } // adding 0 would take an instruction, for the sake of -0

#if defined(__AVX512F__)
// One instruction each, which compilers do not use for a conditional.
inline Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }

inline Floats smaller(Floats a, Floats b) { return (Floats)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__aarch64__)
// One instruction each, too. Of a NaN and a number, the number is larger and the NaN smaller.
inline Floats larger(Floats a, Floats b) { return (Floats)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b); }

inline Floats smaller(Floats a, Floats b) { return (Floats)vminq_f32((float32x4_t)a, (float32x4_t)b); }
#else
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
#endif

inline float sum(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__aarch64__)
    return vaddvq_f32((float32x4_t)x);
#else
    float out = 0;
    for (int i = 0; i < LANES; i++) out += x[i];
    return out;
#endif
}

inline float highest(Floats x) {
#if defined(__aarch64__)
    return vmaxnmvq_f32((float32x4_t)x);
#else
    float out = x[0];
    for (int i = 1; i < LANES; i++) out = x[i] > out ? x[i] : out;
    return out;
#endif
}

inline int sum(Ints x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#elif defined(__aarch64__)
    return vaddvq_s32((int32x4_t)x);
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
#elif defined(__aarch64__)
    return vaddvq_u32((uint32x4_t)((yes != 0) & Ints{1, 2, 4, 8}));
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
#if defined(__aarch64__)
    __fp16 out;
    std::memcpy(&out, &half, sizeof out);
    return out;
#else
    const float size = from_word(uint32_t(half & 0x7fff) << 13) * 0x1p112f;
    const float out = (half & 0x7c00) == 0x7c00 ? from_word(0x7f800000u | uint32_t(half & 0x3ff) << 13) : size;
    return half & 0x8000 ? -out : out;
#endif
}

// 2^x for x in [-126, 127]: below, 2^-126. The power of two goes into the exponent's bits; the polynomial (least maximal
// relative error on [-1/2, 1/2]) is good to 1e-7.
inline Floats exp2(Floats x) {
    const float shift = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer.
    x = larger(x, all(-126.0f));
    Floats shifted = x + shift;
    Floats part = x - (shifted - shift);
    Floats power = part * 0.00132764546f + 0.00967554037f;
    power = power * part + 0.0555071331f;
    power = power * part + 0.240221197f;
    power = power * part + 0.693146967f;
    power = power * part + 1.0f;
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
    const Floats power = exp2(smaller(x * (2 * LOG2_E / cap), all(64.0f)));
    return cap - 2 * cap / (power + 1.0f);
}

} // namespace HFS
