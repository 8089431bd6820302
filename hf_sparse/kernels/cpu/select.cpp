// The grouped selector: the pairs of a group keep the keys of the past that are most important to all of them.

#include "importance.hpp"

#include <memory>
#include <optional>

using namespace HFS;

namespace {

// Tiles of keys that are unpacked at a time: many for many pairs, and few for few of them, so that memory is not idle
// while their weights are found.
constexpr int64_t CHUNK_TILES = 32, FEW_CHUNK_TILES = 4;
constexpr int64_t PART_TILES = 256; // tiles that a thread takes where all threads share a group

template <int count> using Sets = std::vector<std::unique_ptr<PairSet<count>>>;

// All pairs of a group, in sets that know what their weights are relative to.
template <int count> Sets<count> sets_of(const Group &group, int64_t dim) {
    Sets<count> sets;
    const Sample sample(group, dim);
    for (int64_t set = 0; set < int64_t(group.pairs.size()); set += count) {
        sets.push_back(std::make_unique<PairSet<count>>(group, set, dim));
        sets.back()->find_totals(sample);
    }
    return sets;
}

// Importance of the tiles in [from, to), of which `chunk` are unpacked at a time.
template <int count>
void find_importance(const Group &group, const Sets<count> &sets, int64_t dim, int64_t from, int64_t to, int64_t chunk,
                     float *out) {
    std::fill(out, out + (to - from) * TILE, 0.0f);
#if defined(HFS_AMX)
    std::optional<amx::Registers> registers;
    if (RoundedQueries<count>::by_matrix_unit(dim)) registers.emplace();
#endif
    uint8_t *keys = scratch<uint8_t, 22>(chunk * TILE * dim);
    for (int64_t at = from; at < to; at += chunk) {
        const int64_t end = std::min(to, at + chunk);
        unpack(group.codes, dim, at, end, keys);
        for (const auto &set : sets) set->add(keys, at, end, out + (at - from) * TILE);
    }
}

// Many groups, one thread each.
void select_many(const Selecting &call) {
    in_parallel(call.batches * call.kv_heads * call.groups(), call.threads, [&](int64_t index) {
        Group group(call, index);
        float *importance = nullptr;
        if (group.ranking_wanted()) {
            const int64_t from = group.first_tile(), to = group.last_tile();
            importance = scratch<float, 23>((to - from) * TILE);
            find_importance<SET>(group, sets_of<SET>(group, call.dim), call.dim, from, to, CHUNK_TILES, importance);
        }
        group.write(importance);
    });
}

// Single queries, as in decoding: the threads share the keys of each group.
template <int count> void select_few(const Selecting &call) {
    struct Part {
        int64_t group, from, to;
    };
    const int64_t number = call.batches * call.kv_heads;
    std::vector<std::unique_ptr<Group>> groups(number);
    std::vector<Sets<count>> sets(number);
    std::vector<float *> importance(number, nullptr);
    std::vector<Part> parts;
    in_parallel(number, call.threads, [&](int64_t i) {
        groups[i] = std::make_unique<Group>(call, i);
        if (groups[i]->ranking_wanted()) sets[i] = sets_of<count>(*groups[i], call.dim);
    });
    int64_t tiles = 0;
    for (const auto &group : groups) tiles += group->last_tile() - group->first_tile();
    float *next = scratch<float, 23>(tiles * TILE);
    for (int64_t i = 0; i < number; i++) {
        if (!groups[i]->ranking_wanted()) continue;
        const int64_t from = groups[i]->first_tile(), to = groups[i]->last_tile();
        importance[i] = next;
        next += (to - from) * TILE;
        for (int64_t at = from; at < to; at += PART_TILES) parts.push_back({i, at, std::min(to, at + PART_TILES)});
    }
    in_parallel(parts.size(), call.threads, [&](int64_t index) {
        const Part &part = parts[index];
        const Group &group = *groups[part.group];
        float *to = importance[part.group] + (part.from - group.first_tile()) * TILE;
        find_importance<count>(group, sets[part.group], call.dim, part.from, part.to, FEW_CHUNK_TILES, to);
    });
    in_parallel(number, call.threads, [&](int64_t i) { groups[i]->write(importance[i]); });
}

} // namespace

// Fills `positions` and `runs`.
extern "C" void HFS_NAME(select)(const Selecting *call) {
    if (call->q_len > 1) return select_many(*call);
    switch (call->share()) {
    case 1: return select_few<1>(*call);
    case 2: return select_few<2>(*call);
    case 3: return select_few<3>(*call);
    case 4: return select_few<4>(*call);
    default: return select_few<SET>(*call);
    }
}
