// What the kernels are called with, field by field as in `calls.py`. Sizes and strides in elements.
#pragma once

#include "codes.hpp"

namespace HFS {

constexpr int64_t RUNS = 3; // runs of places that a pair keeps: from its first key, up to its last, and of the past

struct Selecting {
    QuantisedKeys codes;
    int64_t dim;
    const float *query;   // (batch, heads, q_len, dim), contiguous, scaled
    const int64_t *first; // (batch, q_len): the first position that a query sees
    const int64_t *stop;  // (batch, q_len): one after the last
    const int64_t *budget;
    int64_t budget_batch, budget_head, budget_query; // strides
    int64_t batches, heads, kv_heads, q_len, size;   // `size` queries in a group
    int64_t sink_keys, recent_keys;
    double softcap;     // 0 for none
    int64_t width;      // room in a list of positions, a multiple of TILE
    int64_t *positions; // (batch, kv_heads, groups, width)
    int64_t *runs;      // (batch, kv_heads, groups, pairs, RUNS, 2): places that a pair keeps
    int64_t threads;

    int64_t share() const { return heads / kv_heads; }
    int64_t groups() const { return q_len / size; }
    int64_t pairs() const { return share() * size; }
};

struct Attending {
    States key, value;
    const float *query; // (batch, heads, q_len, dim), contiguous, scaled
    int64_t batches, heads, kv_heads, q_len, size, width;
    int64_t per_head; // whether a group holds queries of one head instead of all heads that share keys
    const int64_t *positions; // (batch, kv_heads, groups, width); if `per_head`, groups go by head, then query
    const uint8_t *allowed;   // (batch, kv_heads, groups, pairs, width), or null
    const int64_t *runs;      // else (batch, kv_heads, groups, pairs, RUNS, 2): first place and place after the last
    const float *sinks;       // (heads) logits without a value, or null
    double softcap;           // 0 for none
    float *out;               // (batch, heads, q_len, value.dim), contiguous
    int64_t threads;
};

// Both, for a query of each sequence.
struct Decoding {
    States query; // (batch, heads, 1, dim)
    double scaling;
    States key, value;
    QuantisedKeys codes; // of all keys but the one at `newest`, which is yet to be quantised
    const float *center; // (batch, kv_heads, dim): what is subtracted from a key before
    int64_t newest;
    const int64_t *first, *stop, *budget; // (batch, 1), (batch, 1), and (batch, heads, 1) with these strides
    int64_t budget_batch, budget_head;
    int64_t batches, heads, kv_heads, sink_keys, recent_keys;
    const float *sinks;
    double softcap;
    float *out; // (batch, heads, 1, value.dim), contiguous
    int64_t threads;
};

} // namespace HFS
