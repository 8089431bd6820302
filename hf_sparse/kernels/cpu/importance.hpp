// Importance of the past: the attention weights of a group's pairs for each key, summed, from rounded queries and keys.
//
// A weight is relative to all that a pair sees. That total is estimated: from the keys that are not of the past, and of the
// past from `WINDOW` neighbouring keys in every `PERIOD`.
#pragma once

#include "group.hpp"

namespace HFS {

constexpr int64_t WINDOW = 64, PERIOD = 1024;
constexpr float LOWEST_SCORE = -1e30f; // below every score, and no infinity: differences are numbers

// The unpacked tiles of a group whose keys the totals are estimated from.
class Sample {
  public:
    // Positions in [low, high) of a tile; each counts for `weight` keys.
    struct Part {
        int64_t tile, low, high;
        float weight;
    };
    std::vector<Part> parts;
    const uint8_t *keys; // (parts, dim / 4, TILE, 4)

    Sample(const Group &group, int64_t dim) {
        take(group.oldest, group.edge_stop);
        take(group.local_start, group.last_stop);
        const int64_t kept = parts.size(), size = group.past_size(), period = size > PERIOD ? PERIOD : WINDOW;
        int64_t seen = 0;
        for (int64_t at = group.past_start; at < group.past_stop; at += period)
            seen += take(at, std::min(at + WINDOW, group.past_stop));
        for (size_t i = kept; i < parts.size(); i++) parts[i].weight = float(size) / seen;
        uint8_t *to = scratch<uint8_t, 20>(parts.size() * TILE * dim);
        keys = to;
        for (const Part &part : parts) {
            unpack(group.codes, dim, part.tile, part.tile + 1, to);
            to += TILE * dim;
        }
    }

  private:
    int64_t take(int64_t from, int64_t to) {
        for (int64_t tile = from / TILE; from < to && tile * TILE < to; tile++) parts.push_back({tile, from, to, 1.0f});
        return to - from;
    }
};

// `count` pairs of a group, from `set` on.
template <int count> class PairSet {
  public:
    PairSet(const Group &group, int64_t set, int64_t dim)
        : group(group), set(set), softcap(group.softcap()),
          queries(dim, [&](int p) { return alive(set + p) ? group.pairs[set + p].query : nullptr; }) {}

    // Find what weights are relative to. Call this before `add`.
    void find_totals(const Sample &sample) {
        float *scores = scratch<float, 21>(sample.parts.size() * TILE * count);
        Floats most[count], total[count] = {};
        for (int p = 0; p < count; p++) most[p] = all(LOWEST_SCORE);
        for (size_t i = 0; i < sample.parts.size(); i++) see(sample, i, scores + i * TILE * count, most);
        for (int p = 0; p < count; p++) most[p] = all(std::ceil(highest(most[p])));
        for (size_t i = 0; i < sample.parts.size(); i++)
            for (int p = 0; p < count; p++)
                for (int part = 0; part < PARTS; part++) {
                    const Floats score = load(scores + (i * count + p) * TILE + part * LANES);
                    total[p] += rough_exp2((score - most[p] + BIAS) * UNIT) * sample.parts[i].weight;
                }
        for (int p = 0; p < count; p++) {
            const bool counts = alive(set + p);
            base[p] = counts ? (BIAS - most[p][0] - std::log2(sum(total[p]))) * UNIT : 0;
            factor[p] = counts ? queries.scales[p] * UNIT : 0; // and no weight for pairs that do not count
            cap[p] = counts ? BIAS * UNIT : 0;
        }
    }

    // Add the weights of all pairs for unpacked tiles `keys` of the past to `importance`, TILE numbers a tile.
    void add(const uint8_t *keys, int64_t from, int64_t to, float *importance) const {
        constexpr int together = tiles_together<count>();
        int64_t tile = from;
#if defined(HFS_AMX)
        if constexpr (count == amx::ROWS)
            if (queries.by_matrix_unit(queries.dim)) tile = add_by_matrix_unit(keys, from, to, importance);
#endif
        for (; tile + together <= to; tile += together) add_tiles<together>(keys, from, tile, importance);
        for (; tile < to; tile++) add_tiles<1>(keys, from, tile, importance);
    }

  private:
    const Group &group;
    const int64_t set;
    const float softcap;
    RoundedQueries<count> queries;
    float base[count], factor[count], cap[count];

    bool alive(int64_t p) const { return p < int64_t(group.pairs.size()) && group.pairs[p].alive(); }

    template <int tiles> void add_tiles(const uint8_t *keys, int64_t from, int64_t tile, float *importance) const {
        Floats scores[tiles][count][PARTS];
        const int64_t at = (tile - from) * TILE;
        queries.template unscaled<tiles>(keys + at * queries.dim, group.codes.scales + tile * TILE, scores);
        for (int t = 0; t < tiles; t++)
            for (int part = 0; part < PARTS; part++) {
                float *to = importance + at + t * TILE + part * LANES;
                Floats sum = load(to);
                for (int p = 0; p < count; p++) sum += weights(p, scores[t][p][part]);
                store(to, sum);
            }
    }

    // Weights of pair `set` + p for scores that are still to be multiplied by its scale.
    Floats weights(int p, Floats score) const {
        const Floats y = softcap > 0 ? capped(score * queries.scales[p], softcap) * UNIT + base[p]
                                     : score * factor[p] + base[p];
        return rough_exp2(smaller(all(cap[p]), y)); // NaN comes second: no weight of more than 1
    }

#if defined(HFS_AMX)
    // Add the weights for whole numbers of tiles that are multiplied together; gives the first tile that is left. While
    // the matrix unit multiplies, the weights that follow from the products before are found.
    int64_t add_by_matrix_unit(const uint8_t *keys, int64_t from, int64_t to, float *importance) const {
        constexpr int together = amx::TOGETHER;
        alignas(64) int32_t start[count][TILE], sums[2][together][count][TILE];
        for (int p = 0; p < count; p++) std::fill(start[p], start[p] + TILE, queries.offsets[p]);
        const int64_t steps = (to - from) / together;
        for (int64_t step = 0; step <= steps; step++) {
            if (step < steps)
                amx::add_products(queries.turned.data(), keys + step * together * TILE * queries.dim, queries.dim, start[0],
                                  sums[step % 2][0][0]);
            if (step == 0) continue;
            const int64_t at = (step - 1) * together;
            for (int t = 0; t < together; t++) {
                const Floats scale = load(group.codes.scales + (from + at + t) * TILE);
                float *out = importance + (at + t) * TILE;
                Floats sum = load(out);
                for (int p = 0; p < count; p++)
                    sum += weights(p, __builtin_convertvector(load(sums[(step - 1) % 2][t][p]), Floats) * scale);
                store(out, sum);
            }
        }
        return from + steps * together;
    }
#endif

    // Write the scores of a part of a sample, (count, TILE), and raise `most` to the highest; `LOWEST_SCORE` for what a
    // pair does not see.
    void see(const Sample &sample, size_t index, float *out, Floats *most) const {
        const Sample::Part &part = sample.parts[index];
        Floats scores[1][count][PARTS];
        queries.template unscaled<1>(sample.keys + index * TILE * queries.dim, group.codes.scales + part.tile * TILE, scores);
        for (int p = 0; p < count; p++) {
            const bool any = alive(set + p);
            const int32_t low = any ? int32_t(std::max(part.low, group.pairs[set + p].first)) : 0;
            const int32_t high = any ? int32_t(std::min(part.high, group.pairs[set + p].stop)) : 0;
            for (int half = 0; half < PARTS; half++) {
                const Ints position = counting(part.tile * TILE + half * LANES);
                Floats score = scores[0][p][half] * queries.scales[p];
                if (softcap > 0) score = capped(score, softcap);
                score = (position >= low) & (position < high) ? score : all(LOWEST_SCORE);
                most[p] = larger(score, most[p]);
                store(out + p * TILE + half * LANES, score);
            }
        }
    }
};

} // namespace HFS
