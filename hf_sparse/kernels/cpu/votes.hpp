// Votes on older keys: the attention weights of a group's members, summed, from 8-bit scores.
#pragma once

#include "group.hpp"

namespace hfs {

// `count` members of a group, from `set` on, that vote together.
template <int count> class Ballot {
  public:
    Ballot(const Group &group, int64_t set, int64_t dim)
        : group(group), softcap(group.softcap()), queries(dim, [&](int m) { return voter(set + m) ? query(set + m) : nullptr; }) {
        for (int m = 0; m < count; m++) {
            const bool votes = voter(set + m);
            first[m] = votes ? std::max(group.begin, group.members[set + m].first) : group.low;
            base[m] = votes ? group.members[set + m].total : INFINITY; // weights of 2^-126
            latest = std::max(latest, votes ? first[m] : 0);
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
                for (int m = 0; m < count; m++) scores[m] = capped(scores[m], softcap);
            const bool whole = tile * LANES >= latest && (tile + 1) * LANES <= group.low;
            for (int m = 0; m < count; m++) {
                Floats weight = exp2<true>(smaller(all(HIGHEST), scores[m] - base[m])); // NaN comes second: no weight
                if (!whole) weight = within(weight, tile, first[m], group.low);
                sums[m] += weight;
                store_halves(weights + ((tile - from) * count + m) * LANES, weight);
            }
        }
        for (int m = 0; m < count; m++) totals[m] += sum(sums[m]);
    }

    // Whether a key outweighs all that is certain by more than weights hold; if so, measure from higher up.
    bool raise(const float *totals) {
        bool again = false;
        for (int m = 0; m < count; m++)
            if (totals[m] >= std::ldexp(1.0f, int(HIGHEST)) && raised[m] < MOST_RAISED) {
                base[m] += HIGHEST;
                raised[m] += HIGHEST;
                again = true;
            }
        return again;
    }

    // Add the weights, as shares of all that a member attends to, to the votes of the same tiles.
    void add(int64_t tiles, const uint16_t *weights, const float *totals, float *votes) const {
        float shares[count];
        for (int m = 0; m < count; m++) shares[m] = 1.0f / (totals[m] + std::exp2(-raised[m]));
        for (int64_t tile = 0; tile < tiles; tile++) {
            Floats sum = load(votes + tile * LANES);
            for (int m = 0; m < count; m++) sum += from_halves(weights + (tile * count + m) * LANES) * shares[m];
            store(votes + tile * LANES, sum);
        }
    }

  private:
    static constexpr int64_t AHEAD = 8; // tiles that are fetched from memory before they are needed
    static constexpr float HIGHEST = 80; // 2^80 times as many keys as there can be are still a float.
    static constexpr float MOST_RAISED = 8000; // More has to do with infinite keys, above which there is nothing.

    const Group &group;
    const float softcap;
    QuantisedQueries<count> queries;
    int64_t first[count], latest = 0; // where the older keys begin that a member sees, or all members see
    float base[count], raised[count] = {};

    bool voter(int64_t m) const { return m < int64_t(group.members.size()) && group.members[m].alive(); }
    const float *query(int64_t m) const { return group.members[m].query; }
};

} // namespace hfs
