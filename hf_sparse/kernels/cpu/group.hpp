// What one group keeps. Its (query, head) pairs are neighbouring queries, or a single one, times the query heads that
// share a key head (GQA).
//
// Every pair keeps its attention sinks (StreamingLLM, arXiv 2309.17453) and its recent keys. Keys that are near some query
// of the group, or the first of its text, are kept in intervals of each pair's own. The past, which all pairs see, is what
// lies between: all pairs keep the keys that are most important to them together (`importance.hpp`).
#pragma once

#include "calls.hpp"
#include "ranking.hpp"

namespace HFS {

// A query of one head.
struct Pair {
    const float *query;
    int64_t first, stop, budget;
    int64_t first_stop, last_start; // it keeps the positions in [first, first_stop) and in [last_start, stop)
    int64_t ranked;                 // and as many keys of the past

    bool alive() const { return stop > first; }
};

class Group {
  public:
    std::vector<Pair> pairs;
    Codes codes;
    int64_t oldest, edge_stop;      // the positions in [oldest, edge_stop) are first keys of some pair
    int64_t past_start, past_stop;  // the past
    int64_t local_start, last_stop; // the positions in [local_start, last_stop) are near
    int64_t most_ranked = 0;        // keys of the past that some pair keeps
    int64_t least_ranked = INT64_MAX; // the same of the pair that keeps the fewest, but any

    Group(const Selecting &call, int64_t index) : call(call) {
        const int64_t group = index % call.groups(), kv_head = index / call.groups() % call.kv_heads;
        const int64_t batch = index / call.groups() / call.kv_heads;
        codes = call.codes.of(batch, kv_head);
        positions = call.positions + index * call.width;
        runs = call.runs + index * call.pairs() * RUNS * 2;
        for (int64_t p = 0; p < call.pairs(); p++) {
            const int64_t head = kv_head * call.share() + p / call.size, query = group * call.size + p % call.size;
            const int64_t at = batch * call.q_len + query;
            const int64_t budget =
                call.budget[batch * call.budget_batch + head * call.budget_head + query * call.budget_query];
            pairs.push_back({call.query + ((batch * call.heads + head) * call.q_len + query) * call.dim, call.first[at],
                             call.stop[at], budget, 0, 0, 0});
        }
        find_ranges();
        for (Pair &pair : pairs)
            if (pair.alive()) spend(pair);
    }

    int64_t past_size() const { return past_stop - past_start; }

    // The soft cap of scores to the base 2; 0 for none.
    float softcap() const { return float(call.softcap * LOG2_E); }

    // Whether the past must be ranked, because some pair wants a part of it.
    bool ranking_wanted() const { return least_ranked < past_size(); }
    int64_t first_tile() const { return past_start / TILE; }
    int64_t last_tile() const { return (past_stop + TILE - 1) / TILE; }

    // Write what the pairs keep. `importance`, which is overwritten, holds that of the tiles from `first_tile` on; none
    // is negative. Where some pairs keep less of the past than others, the keys that not all keep are sorted.
    void write(float *importance) {
        std::fill(positions, positions + call.width, 0);
        int64_t place = 0;
        for (int64_t i = oldest; i < edge_stop; i++) positions[place++] = i;
        for (int64_t i = local_start; i < last_stop; i++) positions[place++] = i;
        const int64_t near = round_up(place, TILE);
        take_best(importance, positions + near);
        for (size_t p = 0; p < pairs.size(); p++) {
            const Pair &pair = pairs[p];
            int64_t *run = runs + p * RUNS * 2;
            std::fill(run, run + RUNS * 2, 0);
            if (!pair.alive()) continue;
            run[0] = place_of(pair.first), run[1] = run[0] + pair.first_stop - pair.first;
            run[2] = place_of(pair.last_start), run[3] = run[2] + pair.stop - pair.last_start;
            run[4] = near, run[5] = near + pair.ranked;
        }
    }

  private:
    const Selecting &call;
    int64_t *positions, *runs;

    void find_ranges() {
        int64_t least_stop = INT64_MAX, most_first = 0;
        oldest = INT64_MAX, last_stop = 0;
        for (const Pair &pair : pairs) {
            if (!pair.alive()) continue;
            oldest = std::min(oldest, pair.first);
            most_first = std::max(most_first, pair.first);
            least_stop = std::min(least_stop, pair.stop);
            last_stop = std::max(last_stop, pair.stop);
        }
        if (last_stop == 0) oldest = least_stop = 0;
        edge_stop = std::min(most_first + call.sink_keys, last_stop);
        past_start = edge_stop;
        past_stop = std::max(least_stop - std::max<int64_t>(1, call.recent_keys), past_start);
        local_start = past_stop;
    }

    // Spend the budget of a pair: on recent keys, sinks, other near keys, the past, and what then is left.
    void spend(Pair &pair) {
        const int64_t recent = std::min(pair.budget, call.recent_keys);
        const int64_t sinks = std::min(pair.budget - recent, call.sink_keys);
        int64_t left = pair.budget - recent - sinks;
        const int64_t local = pair.stop - recent - std::max(local_start, pair.first + sinks);
        const int64_t more = std::max<int64_t>(0, std::min(left, local));
        pair.last_start = pair.stop - recent - more;
        left -= more;
        pair.ranked = std::min(left, past_size());
        pair.first_stop = pair.first + sinks + left - pair.ranked;
        most_ranked = std::max(most_ranked, pair.ranked);
        if (pair.ranked > 0) least_ranked = std::min(least_ranked, pair.ranked);
    }

    // The place of a near or first key in the list.
    int64_t place_of(int64_t position) const {
        return position - oldest - (position >= local_start ? local_start - edge_stop : 0);
    }

    // The most important positions of the past, as many as any pair keeps.
    void take_best(float *importance, int64_t *ranked) {
        if (!ranking_wanted()) {
            for (int64_t i = 0; i < most_ranked; i++) ranked[i] = past_start + i;
            return;
        }
        // As integers they have the same order.
        int32_t *values = reinterpret_cast<int32_t *>(importance);
        const int64_t from = first_tile() * TILE, number = last_tile() * TILE - from;
        std::fill(values, values + past_start - from, NEVER);
        std::fill(values + past_stop - from, values + number, NEVER);
        Bound bound = best(values, number / LANES, most_ranked);
        int64_t *next = ranked;
        for (int64_t i = 0; i < number; i += LANES) {
            uint32_t chosen = bits(among_best(load(values + i), bound));
            for (; chosen; chosen &= chosen - 1) *next++ = from + i + __builtin_ctz(chosen);
        }
        if (least_ranked == most_ranked) return;
        const auto before = [&](int64_t a, int64_t b) { // of equal ones the most recent
            const int32_t left = values[a - from], right = values[b - from];
            return left != right ? left > right : a > b;
        };
        std::nth_element(ranked, ranked + least_ranked, next, before);
        std::sort(ranked, ranked + least_ranked);
        std::sort(ranked + least_ranked, next, before);
    }
};

} // namespace HFS
