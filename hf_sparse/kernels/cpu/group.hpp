// The keys that one group keeps. Its (query, head) pairs are a block of queries, or a single one, times the query heads
// that share a key head (GQA).
//
// Every pair keeps its attention sinks (StreamingLLM, arXiv 2309.17453) and its recent keys. The past, the keys between
// sinks and recent window of the group, is ranked by aggregated scores: the attention weights of all pairs, from scores
// in 8 bits, summed (as SnapKV pools scores over queries, arXiv 2404.14469). The best of the past are the group's
// candidates. Each pair spends its free budget on the candidates and window keys with its own highest exact scores.
#pragma once

#include "queries.hpp"
#include "ranking.hpp"
#include "scores.hpp"

namespace hfs {

// One call for all groups. Sizes in elements.
struct Call {
    States key;
    QuantisedKeys quantised;
    const float *query;   // (batch, heads, q_len, dim), contiguous, scaled
    const int64_t *first; // (batch, q_len): the first position that a query sees
    const int64_t *stop;  // (batch, q_len): one after the last
    const int64_t *budget;
    int64_t budget_batch, budget_head, budget_query; // strides
    int64_t batches, heads, kv_heads, q_len, size;   // `size` queries in a group
    int64_t sink_keys, recent_keys, oversampling;
    double softcap; // 0 for none
    int64_t width;      // room in a list of positions, a multiple of LANES
    int64_t *positions; // (batch, kv_heads, groups, width)
    uint8_t *allowed;   // (batch, kv_heads, groups, pairs, width)
    int64_t *kept;      // (batch, kv_heads, groups, pairs)
    float *scores;      // like `allowed`, or null if they are not wanted
    int64_t threads;

    int64_t share() const { return heads / kv_heads; }
    int64_t groups() const { return q_len / size; }
    int64_t pairs() const { return share() * size; }
};

// Most pairs of a group that is scored key by key.
constexpr int64_t MOST_PAIRS = 16;

// A query of one head.
struct Pair {
    const float *query;
    int64_t first, stop, budget;
    int64_t start;       // the position after its own sinks
    int64_t recent;      // the first of its own recent keys
    int64_t free_budget; // budget minus sinks and recent keys
    float kept_lse;      // log-sum-exp, to the base 2, of its scores for the visible keys outside the past

    bool alive() const { return stop > first; }
};

class Group {
  public:
    std::vector<Pair> pairs;
    Tiles tiles;
    int64_t past_start, past_stop; // the past: positions in [past_start, past_stop)

    Group(const Call &call, int64_t index) : call(call) {
        const int64_t group = index % call.groups(), dim = call.key.dim;
        kv_head = index / call.groups() % call.kv_heads;
        batch = index / call.groups() / call.kv_heads;
        tiles = call.quantised.of(batch, kv_head);
        positions = call.positions + index * call.width;
        kept = call.kept + index * call.pairs();
        allowed = call.allowed + index * call.pairs() * call.width;
        scores = call.scores ? call.scores + index * call.pairs() * call.width : nullptr;
        for (int64_t p = 0; p < call.pairs(); p++) {
            const int64_t head = kv_head * call.share() + p / call.size, query = group * call.size + p % call.size;
            const int64_t at = batch * call.q_len + query;
            const int64_t budget =
                call.budget[batch * call.budget_batch + head * call.budget_head + query * call.budget_query];
            pairs.push_back({call.query + ((batch * call.heads + head) * call.q_len + query) * dim, call.first[at],
                             call.stop[at], budget, 0, 0, 0, 0});
        }
        find_ranges();
        std::fill(positions, positions + call.width, 0);
        std::memset(allowed, 0, call.pairs() * call.width);
        if (scores) std::fill(scores, scores + call.pairs() * call.width, 0.0f);
        score_window();
    }

    // The soft cap of scores to the base 2, as the aggregated ones are; 0 for none.
    float softcap() const { return float(call.softcap * LOG2_E); }

    // Whether the past must be ranked: it has more keys than there are candidates.
    bool ranking_wanted() const { return candidate_count > 0 && candidate_count < past_stop - past_start; }
    int64_t first_tile() const { return past_start / LANES; }
    int64_t last_tile() const { return (past_stop + LANES - 1) / LANES; }

    // Find the candidates: the positions with the highest `aggregated` scores, which are those of the tiles from
    // `first_tile` on and are overwritten.
    void choose(float *aggregated) {
        int64_t *next = positions + window_width;
        if (!ranking_wanted()) {
            for (int64_t i = 0; i < candidate_count; i++) *next++ = past_start + i;
            return;
        }
        const int64_t from = first_tile(), number = last_tile() - from;
        int32_t *values = reinterpret_cast<int32_t *>(aggregated); // the same order: no score is negative
        std::fill(values, values + past_start % LANES, NEVER);
        std::fill(values + past_stop - from * LANES, values + number * LANES, NEVER);
        Bound bound = best(values, number, candidate_count);
        for (int64_t i = 0; i < number; i++) {
            uint32_t chosen = bits(among_best(load(values + i * LANES), bound));
            for (; chosen; chosen &= chosen - 1) *next++ = (from + i) * LANES + __builtin_ctz(chosen);
        }
    }

    // Spend the free budget of every pair on candidates and window keys.
    void pick() {
        for_scores(0, list_size(), [&](int64_t p, const float *own) { pick_own(p, own); });
    }

    // The same for one pair, after `score` was called for the whole list.
    void pick(int64_t p) { pick_own(p, scores + p * call.width); }

    // Length of the list of positions: sinks, recent window and candidates.
    int64_t list_size() const { return window_width + candidate_count; }

    // Exact scores of all pairs, at most `MOST_PAIRS`, for the places in [from, to) of the list.
    void score(int64_t from, int64_t to) {
        const float *queries[MOST_PAIRS];
        for (size_t p = 0; p < pairs.size(); p++) queries[p] = pairs[p].query;
        few_scores(call.key, batch, kv_head, queries, pairs.size(), positions, from, to, scores, call.width);
    }

  private:
    const Call &call;
    int64_t batch, kv_head;
    int64_t oldest, sinks_stop, window_stop;
    int64_t sinks = 0;        // places of sinks, the first of the list
    int64_t window_width = 0; // places of sinks and recent window, a multiple of LANES
    int64_t candidate_count = 0;
    int64_t *positions, *kept;
    uint8_t *allowed;
    float *scores;

    void find_ranges() {
        int64_t least_stop = INT64_MAX, most_first = 0;
        oldest = INT64_MAX, window_stop = 0;
        for (const Pair &pair : pairs) {
            if (!pair.alive()) continue;
            oldest = std::min(oldest, pair.first);
            most_first = std::max(most_first, pair.first);
            least_stop = std::min(least_stop, pair.stop);
            window_stop = std::max(window_stop, pair.stop);
        }
        if (window_stop == 0) oldest = least_stop = 0;
        past_stop = std::max(least_stop - std::max<int64_t>(1, call.recent_keys), oldest);
        sinks_stop = std::min(most_first + call.sink_keys, past_stop);
        past_start = std::min(oldest + call.sink_keys, past_stop);
    }

    // Sinks and recent window: which of their keys each pair always keeps, and its free budget.
    void score_window() {
        for (int64_t i = oldest; i < sinks_stop; i++) positions[sinks++] = i;
        int64_t number = sinks;
        for (int64_t i = past_stop; i < window_stop; i++) positions[number++] = i;
        window_width = round_up(number, LANES);
        for_scores(0, number, [&](int64_t p, float *own) { keep_always(pairs[p], p, own, number); });
        int64_t wanted = 0;
        for (const Pair &pair : pairs)
            if (pair.free_budget > 0)
                wanted = std::max(wanted, pair.free_budget + std::max<int64_t>(0, pair.start - past_start));
        candidate_count = std::min(call.oversampling * wanted, past_stop - past_start);
    }

    void keep_always(Pair &pair, int64_t p, const float *own, int64_t number) {
        const int64_t recent = std::min(pair.budget, call.recent_keys);
        pair.start = pair.first + std::min(pair.budget - recent, call.sink_keys);
        pair.recent = pair.stop - recent;
        // A soft cap changes the weights of keys, not their order.
        const double cap = call.softcap;
        const auto score = [&](int64_t i) { return cap > 0 ? float(cap * std::tanh(own[i] / cap)) : own[i]; };
        int64_t keeps = 0;
        float most = -INFINITY, total = 0;
        for (int pass = 0; pass < 2; pass++)
            for (int64_t i = 0; i < number; i++) {
                const int64_t position = positions[i];
                if (position < pair.first || position >= pair.stop) continue;
                const bool counted = i >= sinks || position < past_start;
                if (pass == 0) {
                    if (counted) most = std::max(most, score(i));
                    const bool keep = position < pair.start || (i >= sinks && position >= pair.recent);
                    allowed[p * call.width + i] = keep;
                    keeps += keep;
                } else if (counted) {
                    total += std::exp(score(i) - most);
                }
            }
        if (pair.alive()) pair.kept_lse = (most + std::log(total)) * LOG2_E;
        pair.free_budget = pair.budget - keeps;
        kept[p] = keeps;
    }

    // Copy the scores of the places in [from, to) of the list to `values`, as integers of the same order.
    void offer(const float *own, int64_t from, int64_t to, int32_t *values) const {
        for (int64_t i = from / LANES * LANES; i < to; i += LANES) {
            const Ints place = counting() + int32_t(i);
            const Ints offered = (place >= int32_t(from)) & (place < int32_t(to));
            store(values + i, offered ? in_order(load(own + i)) : load(values + i));
        }
    }

    void pick_own(int64_t p, const float *own) {
        const Pair &pair = pairs[p];
        if (pair.free_budget <= 0) return;
        const int64_t width = round_up(list_size(), LANES);
        int32_t *values = scratch<int32_t, 2>(width);
        std::fill(values, values + width, NEVER);
        const int64_t window_from = sinks + std::max<int64_t>(0, pair.start - past_stop);
        const int64_t window_to = sinks + std::max<int64_t>(0, std::min(pair.recent, window_stop) - past_stop);
        const int64_t *candidates = positions + window_width;
        const int64_t candidates_start =
            std::lower_bound(candidates, candidates + candidate_count, pair.start) - positions;
        offer(own, window_from, window_to, values);
        offer(own, candidates_start, list_size(), values);
        const int64_t number = std::max<int64_t>(0, window_to - window_from) + list_size() - candidates_start;
        Bound bound = best(values, width / LANES, std::min(pair.free_budget, number));
        uint8_t *to = allowed + p * call.width;
        const auto take = [&](int64_t i) { store_bytes(to + i, from_bytes(to + i) | among_best(load(values + i), bound)); };
        for (int64_t i = window_width; i < width; i += LANES) take(i); // of equal scores the oldest are left out
        for (int64_t i = 0; i < window_width; i += LANES) take(i);
        kept[p] += std::min(pair.free_budget, number);
    }

    // Call `use(pair, scores)` with each pair's exact scores for `number` places of the list from `from` on.
    template <typename Use> void for_scores(int64_t from, int64_t number, Use use) {
        const int64_t width = round_up(number, LANES), dim = call.key.dim, count = pairs.size();
        if (number == 0) {
            for (int64_t p = 0; p < count; p++) use(p, nullptr);
            return;
        }
        float *out = scratch<float, 3>(MOST_PAIRS * width);
        const bool turns = count >= MOST_PAIRS;
        const int64_t together = turns ? SHARING : count;
        const float *queries[MOST_PAIRS];
        float *turned = nullptr;
        if (turns) {
            // The last tile is filled up with a key whose scores are not used.
            std::fill(positions + from + number, positions + from + width, positions[from]);
            turned = scratch<float, 4>(width * dim);
            turn_keys(call.key, batch, kv_head, positions + from, width, turned);
        }
        for (int64_t set = 0; set < count; set += together) {
            for (int64_t p = 0; p < together; p++) queries[p] = pairs[std::min(set + p, count - 1)].query;
            if (turns)
                turned_scores<SHARING>(queries, turned, dim, width, out, width);
            else
                few_scores(call.key, batch, kv_head, queries, count, positions + from, 0, number, out, width);
            for (int64_t p = set; p < std::min(set + together, count); p++) {
                float *own = out + (p - set) * width;
                if (scores) std::memcpy(scores + p * call.width + from, own, number * sizeof *own);
                use(p, own);
            }
        }
    }
};

} // namespace hfs
