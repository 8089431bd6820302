// Aggregated scores of the past: the attention weights of a group's pairs, summed, from scores in 8 bits.
#pragma once

#include "group.hpp"

namespace hfs {

// `count` pairs of a group, from `set` on, whose weights are found together.
template <int count> class Aggregator {
  public:
    Aggregator(const Group &group, int64_t set, int64_t dim)
        : group(group), softcap(group.softcap()),
          queries(dim, [&](int p) { return active(set + p) ? query(set + p) : nullptr; }) {
        for (int p = 0; p < count; p++) {
            const bool used = active(set + p);
            first[p] = used ? std::max(group.past_start, group.pairs[set + p].first) : group.past_stop;
            base[p] = used ? group.pairs[set + p].kept_lse : INFINITY; // weights of 2^-126
            latest = std::max(latest, used ? first[p] : 0);
        }
    }

    // Weights 2^(score - base) of all tiles in [from, to), and their sums, which are added to `totals` (count).
    // Weights are kept as (to - from, count, LANES).
    void weigh(int64_t from, int64_t to, uint16_t *weights, float *totals) const {
        Floats sums[count] = {};
        const int64_t size = LANES * queries.dim;
        for (int64_t tile = from; tile < to; tile++) {
            if (tile + AHEAD < to)
                for (int64_t byte = 0; byte < size; byte += 64)
                    __builtin_prefetch(group.tiles.bytes + (tile + AHEAD) * size + byte);
            Floats scores[count];
            queries.scores(group.tiles, tile, scores);
            if (softcap > 0)
                for (int p = 0; p < count; p++) scores[p] = capped(scores[p], softcap);
            const bool whole = tile * LANES >= latest && (tile + 1) * LANES <= group.past_stop;
            for (int p = 0; p < count; p++) {
                Floats weight = exp2<true>(smaller(all(HIGHEST), scores[p] - base[p])); // NaN comes second: no weight
                if (!whole) weight = within(weight, tile, first[p], group.past_stop);
                sums[p] += weight;
                store_halves(weights + ((tile - from) * count + p) * LANES, weight);
            }
        }
        for (int p = 0; p < count; p++) totals[p] += sum(sums[p]);
    }

    // Whether a weight overflows, relative to the keys outside the past; if so, the base is raised to weigh again.
    bool raise(const float *totals) {
        bool again = false;
        for (int p = 0; p < count; p++)
            if (totals[p] >= std::ldexp(1.0f, int(HIGHEST)) && raised[p] < MOST_RAISED) {
                base[p] += HIGHEST;
                raised[p] += HIGHEST;
                again = true;
            }
        return again;
    }

    // Add the weights of each pair, normalised over all keys that it sees, to the aggregated scores of the same tiles.
    void add(int64_t tiles, const uint16_t *weights, const float *totals, float *aggregated) const {
        float shares[count];
        for (int p = 0; p < count; p++) shares[p] = 1.0f / (totals[p] + std::exp2(-raised[p]));
        for (int64_t tile = 0; tile < tiles; tile++) {
            Floats sum = load(aggregated + tile * LANES);
            for (int p = 0; p < count; p++) sum += from_halves(weights + (tile * count + p) * LANES) * shares[p];
            store(aggregated + tile * LANES, sum);
        }
    }

  private:
    static constexpr int64_t AHEAD = 8; // tiles that are prefetched
    static constexpr float HIGHEST = 80; // a float holds 2^80 times any number of keys
    static constexpr float MOST_RAISED = 8000; // beyond this keys are infinite, and nothing is above them

    const Group &group;
    const float softcap;
    QuantisedQueries<count> queries;
    int64_t first[count], latest = 0; // where the visible past begins for each pair, and for all
    float base[count], raised[count] = {};

    bool active(int64_t p) const { return p < int64_t(group.pairs.size()) && group.pairs[p].alive(); }
    const float *query(int64_t p) const { return group.pairs[p].query; }
};

} // namespace hfs
