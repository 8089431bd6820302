// The highest of many numbers, by bisection: vector instructions compare and count fast.
#pragma once

#include "states.hpp"

#include <algorithm>

namespace HFS {

// Integers in the order of the floats that they come from, for bisection to halve their range.
inline Ints in_order(Floats x) {
    const Ints bits = (Ints)x;
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

constexpr int32_t NEVER = INT32_MIN; // below every number: left out

inline int64_t count_from(const int32_t *values, int64_t tiles, int32_t least) {
    Ints counts[4] = {};
    int64_t i = 0;
    for (; i + 4 <= tiles; i += 4)
        for (int j = 0; j < 4; j++) counts[j] += load(values + (i + j) * LANES) >= least;
    for (; i < tiles; i++) counts[0] += load(values + i * LANES) >= least;
    return -int64_t(sum(counts[0] + counts[1] + counts[2] + counts[3]));
}

// A bound such that the values above it, and those equal to it except for the first `left_out`, are the best `wanted`.
// Of equal keys the most recent are kept: they are more likely to matter.
struct Bound {
    int32_t value;
    int64_t left_out;
};

// By bisection over all values.
inline Bound best_of_few(const int32_t *values, int64_t tiles, int64_t wanted) {
    Ints most = Ints{} + NEVER;
    Ints least = Ints{} + INT32_MAX;
    for (int64_t i = 0; i < tiles; i++) {
        const Ints x = load(values + i * LANES);
        most = x > most ? x : most;
        const Ints counted = x == NEVER ? Ints{} + INT32_MAX : x;
        least = counted < least ? counted : least;
    }
    int64_t low = INT32_MAX, high = NEVER; // at least `wanted` values from `low` on, fewer from `high` on
    for (int i = 0; i < LANES; i++) low = std::min<int64_t>(low, least[i]), high = std::max<int64_t>(high, most[i]);
    high++;
    int64_t from_low = count_from(values, tiles, int32_t(low));
    if (from_low <= wanted) return {int32_t(low), 0};
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const int64_t count = count_from(values, tiles, int32_t(middle));
        if (count == wanted) return {int32_t(middle), 0};
        if (count > wanted)
            low = middle, from_low = count;
        else
            high = middle;
    }
    return {int32_t(low), from_low - wanted};
}

constexpr int64_t SAMPLED = 16; // one tile in so many

// Of many values, a sample says roughly where the bound lies, and only values near it are bisected. If the counts show
// that the sample was wrong, all values are.
inline Bound best(const int32_t *values, int64_t tiles, int64_t wanted) {
    if (wanted <= 0) return {INT32_MAX, INT64_MAX};
    const int64_t sampled = tiles / SAMPLED;
    const double share = double(wanted) / SAMPLED, margin = 4 * std::sqrt(share) + 8;
    if (sampled < LANES || share + margin > sampled * LANES || share <= margin)
        return best_of_few(values, tiles, wanted);
    int32_t *sample = scratch<int32_t, 8>(sampled * LANES), *near = scratch<int32_t, 9>(tiles * LANES);
    for (int64_t i = 0; i < sampled; i++) store(sample + i * LANES, load(values + i * SAMPLED * LANES));
    const int32_t low = best_of_few(sample, sampled, int64_t(share + margin)).value;
    const int32_t high = best_of_few(sample, sampled, int64_t(share - margin)).value;
    Ints above{}, within{};
    int64_t kept = 0;
    for (int64_t i = 0; i < tiles; i++) {
        const Ints x = load(values + i * LANES);
        const Ints is_near = (x >= low) & (x < high);
        above += x >= high;
        within += is_near;
        store(near + kept * LANES, is_near ? x : Ints{} + NEVER);
        kept += bits(is_near) != 0;
    }
    const int64_t left = wanted + sum(above); // a lane that holds counts as -1
    if (left <= 0 || left > -sum(within)) return best_of_few(values, tiles, wanted);
    return best_of_few(near, kept, left);
}

// Whether each value is among the best; counts down `left_out`.
inline Ints among_best(Ints values, Bound &bound) {
    Ints yes = values >= bound.value;
    if (bound.left_out > 0)
        for (int i = 0; i < LANES && bound.left_out > 0; i++)
            if (values[i] == bound.value) yes[i] = 0, bound.left_out--;
    return yes;
}

} // namespace HFS
