// The keys that groups of rows keep.

#include "votes.hpp"

#include <array>
#include <memory>

using namespace hfs;

namespace {

// Keys that a thread weighs at a time where one group is shared by all threads.
constexpr int64_t PART_TILES = 256;

// Many groups: each is the work of one thread.
void select_many(const Call &call) {
    in_parallel(call.batches * call.kv_heads * call.groups(), call.threads, [&](int64_t index) {
        Group group(call, index);
        float *votes = nullptr;
        if (group.votes_wanted()) {
            find_tiles<16>(call.quantised, group, call.key.dim, call.coarse_from);
            votes = scratch<float, 7>(group.tiles.size() * LANES);
            vote<16, KeyScores>(call.quantised, group, call.key.dim, group.tiles.data(), group.tiles.size(), votes);
        }
        group.choose(votes);
        group.pick();
    });
}

// Few groups of few members, as in decoding: the threads share the keys of each group.
template <int count> void select_few(const Call &call) {
    struct Part {
        int64_t group, from, to;
        float totals[count];
    };
    const int64_t number = call.batches * call.kv_heads;
    std::vector<std::unique_ptr<Group>> groups(number);
    std::vector<std::unique_ptr<Ballot<count, KeyScores<count>>>> ballots(number);
    std::vector<float *> votes(number);
    std::vector<uint16_t *> weights(number);
    std::vector<Part> parts;
    in_parallel(number, call.threads, [&](int64_t i) {
        groups[i] = std::make_unique<Group>(call, i);
        if (groups[i]->votes_wanted()) find_tiles<count>(call.quantised, *groups[i], call.key.dim, call.coarse_from);
        ballots[i] = std::make_unique<Ballot<count, KeyScores<count>>>(call.quantised, *groups[i], 0, call.key.dim);
    });
    int64_t room = 0;
    for (const auto &group : groups) room += group->tiles.size();
    float *all_votes = scratch<float, 7>(room * LANES);
    uint16_t *all_weights = scratch<uint16_t, 6>(room * count * LANES);
    for (int64_t i = 0; i < number; i++) {
        const int64_t tiles = groups[i]->tiles.size();
        votes[i] = all_votes, all_votes += tiles * LANES;
        weights[i] = all_weights, all_weights += tiles * count * LANES;
        for (int64_t at = 0; at < tiles; at += PART_TILES) parts.push_back({i, at, std::min(tiles, at + PART_TILES), {}});
    }

    std::vector<std::array<float, count>> totals(number);
    std::vector<char> weighed(number, 0);
    for (bool again = true; again;) {
        in_parallel(parts.size(), call.threads, [&](int64_t index) {
            Part &part = parts[index];
            if (weighed[part.group]) return;
            std::fill(part.totals, part.totals + count, 0.0f);
            ballots[part.group]->weigh(groups[part.group]->tiles.data() + part.from, part.to - part.from,
                                       weights[part.group] + part.from * count * LANES, part.totals);
        });
        for (auto &total : totals) total.fill(0);
        for (const Part &part : parts)
            for (int m = 0; m < count; m++) totals[part.group][m] += part.totals[m];
        again = false;
        for (int64_t i = 0; i < number; i++) {
            weighed[i] = !ballots[i]->raise(totals[i].data());
            again |= !weighed[i];
        }
    }
    in_parallel(parts.size(), call.threads, [&](int64_t index) {
        const Part &part = parts[index];
        float *to = votes[part.group] + part.from * LANES;
        std::fill(to, to + (part.to - part.from) * LANES, 0.0f);
        ballots[part.group]->add(part.to - part.from, weights[part.group] + part.from * count * LANES,
                                 totals[part.group].data(), to);
    });
    in_parallel(number, call.threads, [&](int64_t i) {
        groups[i]->choose(votes[i]);
        groups[i]->pick();
    });
}

} // namespace

// Fills `columns`, `allowed`, `kept` and, if wanted, `scores`.
extern "C" void hfs_select(const Call *call) {
    const int64_t share = call->share();
    if (call->rows > 1 || share > 16)
        select_many(*call);
    else if (share <= 4)
        select_few<4>(*call);
    else if (share <= 8)
        select_few<8>(*call);
    else
        select_few<16>(*call);
}
