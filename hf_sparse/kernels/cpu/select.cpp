// The grouped selector: candidates of every group from aggregated scores, then the keys that each pair keeps.

#include "aggregate.hpp"

#include <array>
#include <memory>

using namespace hfs;

namespace {

// Work of a thread where all threads share one group: tiles of keys to weigh, places of the list to score.
constexpr int64_t PART_TILES = 256, PART_PLACES = 512;

template <int count> void aggregate_alone(const Group &group, int64_t dim, float *aggregated) {
    const int64_t from = group.first_tile(), to = group.last_tile();
    uint16_t *weights = scratch<uint16_t, 6>((to - from) * count * LANES);
    std::fill(aggregated, aggregated + (to - from) * LANES, 0.0f);
    for (int64_t set = 0; set < int64_t(group.pairs.size()); set += count) {
        Aggregator<count> aggregator(group, set, dim);
        float totals[count];
        do {
            std::fill(totals, totals + count, 0.0f);
            aggregator.weigh(from, to, weights, totals);
        } while (aggregator.raise(totals));
        aggregator.add(to - from, weights, totals, aggregated);
    }
}

// Many groups, one thread each.
void select_many(const Call &call) {
    in_parallel(call.batches * call.kv_heads * call.groups(), call.threads, [&](int64_t index) {
        Group group(call, index);
        float *aggregated = nullptr;
        if (group.ranking_wanted()) {
            aggregated = scratch<float, 7>((group.last_tile() - group.first_tile()) * LANES);
            aggregate_alone<SHARING>(group, call.key.dim, aggregated);
        }
        group.choose(aggregated);
        group.pick();
    });
}

// Few groups of few pairs, as in decoding: the threads share the keys of each group.
template <int count> void select_few(const Call &call) {
    struct Part {
        int64_t group, from, to;
        float totals[count];
    };
    const int64_t number = call.batches * call.kv_heads;
    std::vector<std::unique_ptr<Group>> groups(number);
    std::vector<std::unique_ptr<Aggregator<count>>> aggregators(number);
    std::vector<float *> aggregated(number);
    std::vector<uint16_t *> weights(number);
    std::vector<Part> parts;
    in_parallel(number, call.threads, [&](int64_t i) {
        groups[i] = std::make_unique<Group>(call, i);
        aggregators[i] = std::make_unique<Aggregator<count>>(*groups[i], 0, call.key.dim);
    });
    int64_t room = 0;
    for (int64_t i = 0; i < number; i++)
        if (groups[i]->ranking_wanted()) room += groups[i]->last_tile() - groups[i]->first_tile();
    float *all_aggregated = scratch<float, 7>(room * LANES);
    uint16_t *all_weights = scratch<uint16_t, 6>(room * count * LANES);
    for (int64_t i = 0; i < number; i++) {
        if (!groups[i]->ranking_wanted()) continue;
        const int64_t from = groups[i]->first_tile(), to = groups[i]->last_tile();
        aggregated[i] = all_aggregated, all_aggregated += (to - from) * LANES;
        weights[i] = all_weights, all_weights += (to - from) * count * LANES;
        for (int64_t at = from; at < to; at += PART_TILES) parts.push_back({i, at, std::min(to, at + PART_TILES), {}});
    }

    std::vector<std::array<float, count>> totals(number);
    std::vector<char> weighed(number, 0);
    for (bool again = true; again;) {
        in_parallel(parts.size(), call.threads, [&](int64_t index) {
            Part &part = parts[index];
            if (weighed[part.group]) return;
            std::fill(part.totals, part.totals + count, 0.0f);
            uint16_t *to = weights[part.group] + (part.from - groups[part.group]->first_tile()) * count * LANES;
            aggregators[part.group]->weigh(part.from, part.to, to, part.totals);
        });
        for (auto &total : totals) total.fill(0);
        for (const Part &part : parts)
            for (int p = 0; p < count; p++) totals[part.group][p] += part.totals[p];
        again = false;
        for (int64_t i = 0; i < number; i++) {
            weighed[i] = !aggregators[i]->raise(totals[i].data());
            again |= !weighed[i];
        }
    }
    in_parallel(parts.size(), call.threads, [&](int64_t index) {
        const Part &part = parts[index];
        const int64_t at = part.from - groups[part.group]->first_tile();
        float *to = aggregated[part.group] + at * LANES;
        std::fill(to, to + (part.to - part.from) * LANES, 0.0f);
        aggregators[part.group]->add(part.to - part.from, weights[part.group] + at * count * LANES,
                                 totals[part.group].data(), to);
    });
    in_parallel(number, call.threads, [&](int64_t i) { groups[i]->choose(aggregated[i]); });
    parts.clear();
    for (int64_t i = 0; i < number; i++)
        for (int64_t at = 0, end = groups[i]->list_size(); at < end; at += PART_PLACES)
            parts.push_back({i, at, std::min(end, at + PART_PLACES), {}});
    in_parallel(parts.size(), call.threads,
                [&](int64_t index) { groups[parts[index].group]->score(parts[index].from, parts[index].to); });
    in_parallel(number * call.share(), call.threads,
                [&](int64_t i) { groups[i / call.share()]->pick(i % call.share()); });
}

} // namespace

// Fills `positions`, `allowed`, `kept` and, if wanted, `scores`.
extern "C" void hfs_select(const Call *call) {
    const int64_t share = call->share();
    if (call->q_len > 1 || share > MOST_PAIRS || !call->scores) return select_many(*call);
    switch (share) {
    case 1: return select_few<1>(*call);
    case 2: return select_few<2>(*call);
    case 3: return select_few<3>(*call);
    case 4: return select_few<4>(*call);
    default: return share <= 8 ? select_few<8>(*call) : select_few<16>(*call);
    }
}
