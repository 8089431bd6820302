// Votes of a group's members: their attention weights, summed, from 8-bit scores.
#pragma once

#include "group.hpp"

namespace hfs {

// Scores of `count` members for keys, 16 at a time.
template <int count> struct KeyScores {
    static constexpr int64_t COLUMNS = 1; // that one score stands for

    Tiles tiles;
    QuantisedQueries<count> queries;

    template <typename Rows>
    KeyScores(const QuantisedKeys &keys, const Group &group, int64_t dim, Rows rows)
        : tiles(keys.keys.of(group.batch, group.kv_head)), queries(dim, rows) {}

    void operator()(int64_t tile, Floats *out) const { queries.scores(tiles, tile, out); }

    void prefetch(int64_t tile) const {
        const int64_t size = LANES * queries.dim;
        for (int64_t byte = 0; byte < size; byte += 64) __builtin_prefetch(tiles.bytes + tile * size + byte);
    }
};

// Scores that the best key of a tile is expected to have, with the weight of 16 such keys, for 16 tiles at a time.
template <int count> struct TileScores {
    static constexpr int64_t COLUMNS = LANES;
    static constexpr float SPREAD = 1.5f; // standard deviations; the largest of 16 normal variables has 1.77

    Tiles means, variances;
    std::vector<float> square_room;
    QuantisedQueries<count> queries, squares;

    template <typename Rows>
    TileScores(const QuantisedKeys &keys, const Group &group, int64_t dim, Rows rows)
        : means(keys.means.of(group.batch, group.kv_head)), variances(keys.variances.of(group.batch, group.kv_head)),
          square_room(dim), queries(dim, rows), squares(
                                                    dim,
                                                    [&](int m) -> const float * {
                                                        const float *row = rows(m);
                                                        if (!row) return nullptr;
                                                        for (int64_t i = 0; i < dim; i++) square_room[i] = row[i] * row[i];
                                                        return square_room.data();
                                                    },
                                                    0) {}

    void prefetch(int64_t) const {} // they are few, and read in order

    void operator()(int64_t tile, Floats *out) const {
        Floats squared[count];
        queries.scores(means, tile, out);
        squares.scores(variances, tile, squared);
        for (int m = 0; m < count; m++) out[m] += root(squared[m] * LOG2_E) * SPREAD + std::log2(float(LANES));
    }
};

// `count` members of a group, from `set` on, that vote together on what `Scores` are scores for.
template <int count, typename Scores> class Ballot {
  public:
    Ballot(const QuantisedKeys &keys, const Group &group, int64_t set, int64_t dim)
        : scores(keys, group, dim, [&](int m) { return voter(group, set + m) ? group.members[set + m].query : nullptr; }),
          end(group.low / Scores::COLUMNS) {
        for (int m = 0; m < count; m++) {
            const bool votes = voter(group, set + m);
            const int64_t column = votes ? std::max(group.begin, group.members[set + m].first) : group.low;
            first[m] = (column + Scores::COLUMNS - 1) / Scores::COLUMNS;
            base[m] = votes ? group.members[set + m].total : INFINITY; // weights of 2^-126
            latest = std::max(latest, votes ? first[m] : 0);
        }
    }

    // Weights 2^(score - base) for the `number` tiles in the list, (number, count, 16), and their sums, which are added
    // to `totals` (count).
    void weigh(const int32_t *list, int64_t number, uint16_t *weights, float *totals) const {
        Floats sums[count] = {};
        for (int64_t i = 0; i < number; i++) {
            const int64_t tile = list[i];
            if (i + AHEAD < number) scores.prefetch(list[i + AHEAD]);
            Floats own[count];
            scores(tile, own);
            const bool whole = tile * LANES >= latest && (tile + 1) * LANES <= end;
            for (int m = 0; m < count; m++) {
                Floats weight = exp2<true>(smaller(own[m] - base[m], all(HIGHEST)));
                if (!whole) weight = within(weight, tile, first[m], end);
                sums[m] += weight;
                store_halves(weights + (i * count + m) * LANES, weight);
            }
        }
        for (int m = 0; m < count; m++) totals[m] += sum(sums[m]);
    }

    // Whether a key outweighs all that is certain by more than weights hold; if so, measure from higher up.
    bool raise(const float *totals) {
        bool again = false;
        for (int m = 0; m < count; m++)
            if (totals[m] >= std::ldexp(1.0f, int(HIGHEST))) {
                base[m] += HIGHEST;
                raised[m] += HIGHEST;
                again = true;
            }
        return again;
    }

    // Add the weights, as shares of all that a member attends to, to the votes for the same tiles.
    void add(int64_t number, const uint16_t *weights, const float *totals, float *votes) const {
        float shares[count];
        for (int m = 0; m < count; m++) shares[m] = 1.0f / (totals[m] + std::exp2(-raised[m]));
        for (int64_t i = 0; i < number; i++) {
            Floats sum = load(votes + i * LANES);
            for (int m = 0; m < count; m++) sum += from_halves(weights + (i * count + m) * LANES) * shares[m];
            store(votes + i * LANES, sum);
        }
    }

  private:
    static constexpr int64_t AHEAD = 4; // tiles that are fetched from memory before they are needed
    static constexpr float HIGHEST = 80; // 2^80 times as many keys as there can be are still a float.

    Scores scores;
    int64_t end, first[count], latest = 0; // where a member's votes begin and all end, and where the last one's begin
    float base[count], raised[count] = {};

    static bool voter(const Group &group, int64_t m) {
        return m < int64_t(group.members.size()) && group.members[m].alive();
    }
};

// All members vote on the `number` tiles in the list: `votes` (number, 16).
template <int count, template <int> typename Scores>
void vote(const QuantisedKeys &keys, const Group &group, int64_t dim, const int32_t *list, int64_t number, float *votes) {
    uint16_t *weights = scratch<uint16_t, 6>(number * count * LANES);
    std::fill(votes, votes + number * LANES, 0.0f);
    for (int64_t set = 0; set < int64_t(group.members.size()); set += count) {
        Ballot<count, Scores<count>> ballot(keys, group, set, dim);
        float totals[count];
        do {
            std::fill(totals, totals + count, 0.0f);
            ballot.weigh(list, number, weights, totals);
        } while (ballot.raise(totals));
        ballot.add(number, weights, totals, votes);
    }
}

// The tiles of older keys on which a group votes: all, or where there are very many the most promising of them.
template <int count> void find_tiles(const QuantisedKeys &keys, Group &group, int64_t dim, int64_t coarse_from) {
    const int64_t from = group.begin / LANES, to = (group.low + LANES - 1) / LANES;
    group.tiles.resize(to - from);
    for (int64_t i = from; i < to; i++) group.tiles[i - from] = int32_t(i);
    // Four times the pool survives: at twice the budget per tile, a look at tiles loses too much.
    const int64_t wanted = 4 * group.pool() / LANES;
    if (group.low - group.begin < coarse_from || 2 * wanted > to - from) return;
    const int64_t first = (group.begin + LANES - 1) / LANES, last = group.low / LANES; // those that lie wholly inside
    const int64_t low = first / LANES, number = (last + LANES - 1) / LANES - low;
    int32_t *list = scratch<int32_t, 8>(number);
    for (int64_t i = 0; i < number; i++) list[i] = int32_t(low + i);
    float *votes = scratch<float, 9>(number * LANES);
    vote<count, TileScores>(keys, group, dim, list, number, votes);
    int32_t *values = rank(votes, list, number, first, last);
    Bound bound = best(values, number, wanted);
    group.tiles.clear();
    if (from < first) group.tiles.push_back(int32_t(from));
    for (int64_t i = 0; i < number; i++) {
        const Ints chosen = among_best(load(values + i * LANES), bound);
        for (int j = 0; j < LANES; j++)
            if (chosen[j]) group.tiles.push_back(list[i] * LANES + j);
    }
    if (last < to) group.tiles.push_back(int32_t(last));
}

} // namespace hfs
