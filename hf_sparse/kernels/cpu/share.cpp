// The shared selector: the pairs of a block keep the keys of the past that are most important to all of them.

#include "importance.hpp"

#include <memory>

using namespace hfs;
using namespace hfs::shared;

namespace {

// Tiles of keys that are unpacked at a time, and that a thread takes where all threads share a block.
constexpr int64_t CHUNK_TILES = 32, PART_TILES = 256;

template <int count> using Sets = std::vector<std::unique_ptr<Voters<count>>>;

// All pairs of a block, in sets that know what their weights are relative to.
template <int count> Sets<count> voters_of(const Block &block, int64_t dim) {
    Sets<count> sets;
    const Sample sample(block, dim);
    for (int64_t set = 0; set < int64_t(block.pairs.size()); set += count) {
        sets.push_back(std::make_unique<Voters<count>>(block, set, dim));
        sets.back()->find_totals(sample);
    }
    return sets;
}

// Importance of the tiles in [from, to).
template <int count>
void find_importance(const Block &block, const Sets<count> &sets, int64_t dim, int64_t from, int64_t to, float *out) {
    std::fill(out, out + (to - from) * TILE, 0.0f);
    uint8_t *keys = scratch<uint8_t, 22>(CHUNK_TILES * TILE * dim);
    for (int64_t at = from; at < to; at += CHUNK_TILES) {
        const int64_t end = std::min(to, at + CHUNK_TILES);
        unpack(block.codes, dim, at, end, keys);
        for (const auto &set : sets) set->add(keys, at, end, out + (at - from) * TILE);
    }
}

// Many blocks, one thread each.
void share_many(const Call &call) {
    in_parallel(call.batches * call.kv_heads * call.blocks(), call.threads, [&](int64_t index) {
        Block block(call, index);
        float *importance = nullptr;
        if (block.ranking_wanted()) {
            const int64_t from = block.first_tile(), to = block.last_tile();
            importance = scratch<float, 23>((to - from) * TILE);
            find_importance<VOTERS>(block, voters_of<VOTERS>(block, call.dim), call.dim, from, to, importance);
        }
        block.write(importance);
    });
}

// Single queries, as in decoding: the threads share the keys of each block.
template <int count> void share_few(const Call &call) {
    struct Part {
        int64_t block, from, to;
    };
    const int64_t number = call.batches * call.kv_heads;
    std::vector<std::unique_ptr<Block>> blocks(number);
    std::vector<Sets<count>> sets(number);
    std::vector<float *> importance(number, nullptr);
    std::vector<Part> parts;
    in_parallel(number, call.threads, [&](int64_t i) {
        blocks[i] = std::make_unique<Block>(call, i);
        if (blocks[i]->ranking_wanted()) sets[i] = voters_of<count>(*blocks[i], call.dim);
    });
    int64_t tiles = 0;
    for (const auto &block : blocks) tiles += block->last_tile() - block->first_tile();
    float *next = scratch<float, 23>(tiles * TILE);
    for (int64_t i = 0; i < number; i++) {
        if (!blocks[i]->ranking_wanted()) continue;
        const int64_t from = blocks[i]->first_tile(), to = blocks[i]->last_tile();
        importance[i] = next;
        next += (to - from) * TILE;
        for (int64_t at = from; at < to; at += PART_TILES) parts.push_back({i, at, std::min(to, at + PART_TILES)});
    }
    in_parallel(parts.size(), call.threads, [&](int64_t index) {
        const Part &part = parts[index];
        const Block &block = *blocks[part.block];
        float *to = importance[part.block] + (part.from - block.first_tile()) * TILE;
        find_importance<count>(block, sets[part.block], call.dim, part.from, part.to, to);
    });
    in_parallel(number, call.threads, [&](int64_t i) { blocks[i]->write(importance[i]); });
}

} // namespace

// Fills `positions` and `runs`.
extern "C" void hfs_share(const Call *call) {
    if (call->q_len > 1) return share_many(*call);
    switch (call->share()) {
    case 1: return share_few<1>(*call);
    case 2: return share_few<2>(*call);
    case 3: return share_few<3>(*call);
    case 4: return share_few<4>(*call);
    default: return share_few<VOTERS>(*call);
    }
}
