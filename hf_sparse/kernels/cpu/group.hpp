// What one group of rows keeps: the rows of a block (or a single one) over the heads of a GQA group.
//
// Its members attend to their sinks and recent keys in any case. On the keys before those that are local to the group
// they vote, each with its attention weights from 8-bit scores, and the best columns are the group's pool. With the rest
// of its budget, each member keeps the keys of the pool and the local ones with its own highest exact scores.
#pragma once

#include "queries.hpp"
#include "ranking.hpp"
#include "scores.hpp"

namespace hfs {

// One call for all groups. Sizes in elements.
struct Call {
    States key;
    QuantisedKeys quantised;
    const float *query;   // (batch, heads, rows, dim), contiguous, scaled
    const int64_t *first; // (batch, rows): the first column that a row sees
    const int64_t *stop;  // (batch, rows): the column after the last one
    const int64_t *budget;
    int64_t budget_batch, budget_head, budget_row; // strides
    int64_t batches, heads, kv_heads, rows, size;  // `size` rows in a group
    int64_t sink_keys, recent_keys, oversampling;
    double softcap; // 0 for none
    int64_t width;    // columns that there is room for, a multiple of LANES
    int64_t *columns; // (batch, kv_heads, groups, width)
    uint8_t *allowed; // (batch, kv_heads, groups, members, width)
    int64_t *kept;    // (batch, kv_heads, groups, members)
    float *scores;    // like `allowed`, or null if they are not wanted
    int64_t threads;

    int64_t share() const { return heads / kv_heads; }
    int64_t groups() const { return rows / size; }
    int64_t members() const { return share() * size; }
};

// Members at most that may count as few.
constexpr int64_t MOST = 16;

struct Member {
    const float *query;
    int64_t first, stop, budget;
    int64_t start;  // the column behind its own sinks
    int64_t recent; // the first of the recent keys that it keeps in any case
    int64_t rest;   // what is left of its budget
    float total;    // log2 of the summed exponentials of its scores for what it attends to anyway

    bool alive() const { return stop > first; }
};

class Group {
  public:
    std::vector<Member> members;
    Tiles tiles;
    int64_t begin, low; // older keys, on which the members vote: columns in [begin, low)

    Group(const Call &call, int64_t index) : call(call) {
        const int64_t group = index % call.groups(), dim = call.key.dim;
        kv_head = index / call.groups() % call.kv_heads;
        batch = index / call.groups() / call.kv_heads;
        tiles = call.quantised.of(batch, kv_head);
        columns = call.columns + index * call.width;
        kept = call.kept + index * call.members();
        allowed = call.allowed + index * call.members() * call.width;
        scores = call.scores ? call.scores + index * call.members() * call.width : nullptr;
        for (int64_t m = 0; m < call.members(); m++) {
            const int64_t head = kv_head * call.share() + m / call.size, row = group * call.size + m % call.size;
            const int64_t at = batch * call.rows + row;
            const int64_t budget =
                call.budget[batch * call.budget_batch + head * call.budget_head + row * call.budget_row];
            members.push_back({call.query + ((batch * call.heads + head) * call.rows + row) * dim, call.first[at],
                               call.stop[at], budget, 0, 0, 0, 0});
        }
        find_spans();
        std::fill(columns, columns + call.width, 0);
        std::memset(allowed, 0, call.members() * call.width);
        if (scores) std::fill(scores, scores + call.members() * call.width, 0.0f);
        look_at_certain();
    }

    // The soft cap of scores that are powers of two, as in votes; 0 for none.
    float softcap() const { return float(call.softcap * LOG2_E); }

    // Whether the older keys in the pool have to be voted on.
    bool votes_wanted() const { return pool_size > 0 && pool_size < low - begin; }
    int64_t first_tile() const { return begin / LANES; }
    int64_t last_tile() const { return (low + LANES - 1) / LANES; }

    // Put the best columns by `votes`, those of the tiles from `first_tile` on, into the pool. Overwrites `votes`.
    void choose(float *votes) {
        int64_t *next = columns + certain;
        if (!votes_wanted()) {
            for (int64_t i = 0; i < pool_size; i++) *next++ = begin + i;
            return;
        }
        const int64_t from = first_tile(), number = last_tile() - from;
        int32_t *values = reinterpret_cast<int32_t *>(votes); // in their order as well: none is negative
        std::fill(values, values + begin % LANES, NEVER);
        std::fill(values + low - from * LANES, values + number * LANES, NEVER);
        Bound bound = best(values, number, pool_size);
        for (int64_t i = 0; i < number; i++) {
            uint32_t chosen = bits(among_best(load(values + i * LANES), bound));
            for (; chosen; chosen &= chosen - 1) *next++ = (from + i) * LANES + __builtin_ctz(chosen);
        }
    }

    // Let each member keep its own best keys of the pool and the local ones.
    void pick() {
        for_scores(0, offered(), [&](int64_t m, const float *own) { pick_own(m, own); });
    }

    // The same for one member whose scores were worked out before, by `score` of all parts of what is `offered`.
    void pick(int64_t m) { pick_own(m, scores + m * call.width); }

    // How much of the list of columns members pick from.
    int64_t offered() const { return certain + pool_size; }

    // Exact scores of all members, few of them (`MOST`), for the places in [from, to) of the list.
    void score(int64_t from, int64_t to) {
        const float *queries[MOST];
        for (size_t m = 0; m < members.size(); m++) queries[m] = members[m].query;
        few_scores(call.key, batch, kv_head, queries, members.size(), columns, from, to, scores, call.width);
    }

  private:
    const Call &call;
    int64_t batch, kv_head;
    int64_t oldest, sinks_stop, local_stop;
    int64_t sinks = 0;   // columns of sinks, the first of the list
    int64_t certain = 0; // columns with sinks and local keys, a multiple of LANES
    int64_t pool_size = 0;
    int64_t *columns, *kept;
    uint8_t *allowed;
    float *scores;

    void find_spans() {
        int64_t least_stop = INT64_MAX, most_first = 0;
        oldest = INT64_MAX, local_stop = 0;
        for (const Member &member : members) {
            if (!member.alive()) continue;
            oldest = std::min(oldest, member.first);
            most_first = std::max(most_first, member.first);
            least_stop = std::min(least_stop, member.stop);
            local_stop = std::max(local_stop, member.stop);
        }
        if (local_stop == 0) oldest = least_stop = 0;
        low = std::max(least_stop - std::max<int64_t>(1, call.recent_keys), oldest);
        sinks_stop = std::min(most_first + call.sink_keys, low);
        begin = std::min(oldest + call.sink_keys, low);
    }

    // Sinks and recent keys: who keeps which, and what is left of each budget.
    void look_at_certain() {
        for (int64_t i = oldest; i < sinks_stop; i++) columns[sinks++] = i;
        int64_t number = sinks;
        for (int64_t i = low; i < local_stop; i++) columns[number++] = i;
        certain = round_up(number, LANES);
        for_scores(0, number, [&](int64_t m, float *own) { keep_certain(members[m], m, own, number); });
        int64_t wanted = 0;
        for (const Member &member : members)
            if (member.rest > 0) wanted = std::max(wanted, member.rest + std::max<int64_t>(0, member.start - begin));
        pool_size = std::min(call.oversampling * wanted, low - begin);
    }

    void keep_certain(Member &member, int64_t m, const float *own, int64_t number) {
        const int64_t recent = std::min(member.budget, call.recent_keys);
        member.start = member.first + std::min(member.budget - recent, call.sink_keys);
        member.recent = member.stop - recent;
        // A soft cap leaves the order of keys as it is, but not their weights.
        const double cap = call.softcap;
        const auto score = [&](int64_t i) { return cap > 0 ? float(cap * std::tanh(own[i] / cap)) : own[i]; };
        int64_t keeps = 0;
        float most = -INFINITY;
        for (int pass = 0; pass < 2; pass++)
            for (int64_t i = 0; i < number; i++) {
                const int64_t column = columns[i];
                if (column < member.first || column >= member.stop) continue;
                const bool counted = i >= sinks || column < begin;
                if (pass == 0) {
                    if (counted) most = std::max(most, score(i));
                    const bool keep = column < member.start || (i >= sinks && column >= member.recent);
                    allowed[m * call.width + i] = keep;
                    keeps += keep;
                } else if (counted) {
                    member.total += std::exp(score(i) - most);
                }
            }
        if (member.alive()) member.total = (most + std::log(member.total)) * LOG2_E;
        member.rest = member.budget - keeps;
        kept[m] = keeps;
    }

    // Put the scores of the places in [from, to) of the list among the `values` to choose from.
    void offer(const float *own, int64_t from, int64_t to, int32_t *values) const {
        for (int64_t i = from / LANES * LANES; i < to; i += LANES) {
            const Ints place = counting() + int32_t(i);
            const Ints offered = (place >= int32_t(from)) & (place < int32_t(to));
            store(values + i, offered ? in_order(load(own + i)) : load(values + i));
        }
    }

    void pick_own(int64_t m, const float *own) {
        const Member &member = members[m];
        if (member.rest <= 0) return;
        const int64_t width = round_up(offered(), LANES);
        int32_t *values = scratch<int32_t, 2>(width);
        std::fill(values, values + width, NEVER);
        const int64_t local = sinks + std::max<int64_t>(0, member.start - low);
        const int64_t local_end = sinks + std::max<int64_t>(0, std::min(member.recent, local_stop) - low);
        const int64_t *pool = columns + certain;
        const int64_t pool_start = std::lower_bound(pool, pool + pool_size, member.start) - columns;
        offer(own, local, local_end, values);
        offer(own, pool_start, offered(), values);
        const int64_t number = std::max<int64_t>(0, local_end - local) + offered() - pool_start;
        Bound bound = best(values, width / LANES, std::min(member.rest, number));
        uint8_t *to = allowed + m * call.width;
        const auto take = [&](int64_t i) { store_bytes(to + i, from_bytes(to + i) | among_best(load(values + i), bound)); };
        for (int64_t i = certain; i < width; i += LANES) take(i); // older than the local ones: left out before them
        for (int64_t i = 0; i < certain; i += LANES) take(i);
        kept[m] += std::min(member.rest, number);
    }

    // Call `use(member, scores)` with each member's exact scores for `number` columns of the list from `from` on.
    template <typename Use> void for_scores(int64_t from, int64_t number, Use use) {
        const int64_t width = round_up(number, LANES), dim = call.key.dim, count = members.size();
        if (number == 0) {
            for (int64_t m = 0; m < count; m++) use(m, nullptr);
            return;
        }
        float *out = scratch<float, 3>(MOST * width);
        const bool turns = count >= MOST;
        const int64_t together = turns ? SHARING : count;
        const float *queries[MOST];
        float *turned = nullptr;
        if (turns) {
            // What fills up the last tile is looked at, and not used.
            std::fill(columns + from + number, columns + from + width, columns[from]);
            turned = scratch<float, 4>(width * dim);
            turn_keys(call.key, batch, kv_head, columns + from, width, turned);
        }
        for (int64_t set = 0; set < count; set += together) {
            for (int64_t m = 0; m < together; m++) queries[m] = members[std::min(set + m, count - 1)].query;
            if (turns)
                turned_scores<SHARING>(queries, turned, dim, width, out, width);
            else
                few_scores(call.key, batch, kv_head, queries, count, columns + from, 0, number, out, width);
            for (int64_t m = set; m < std::min(set + together, count); m++) {
                float *own = out + (m - set) * width;
                if (scores) std::memcpy(scores + m * call.width + from, own, number * sizeof *own);
                use(m, own);
            }
        }
    }
};

} // namespace hfs
