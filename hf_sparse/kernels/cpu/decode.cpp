// Decoding: the newest key is quantised, keys are selected, and attended to, all in one call. Between calls from Python, an
// operation on small tensors would take as long as one of these steps.

#include "calls.hpp"

using namespace HFS;

extern "C" void HFS_NAME(quantise)(const States *, const QuantisedKeys *, const float *, int64_t, int64_t, int64_t, int64_t,
                                   int64_t);
extern "C" void HFS_NAME(select)(const Selecting *);
extern "C" void HFS_NAME(attend)(const Attending *);

extern "C" void HFS_NAME(decode)(const Decoding *whole) {
    const Decoding &call = *whole;
    const int64_t dim = call.key.dim, groups = call.batches * call.kv_heads;
    HFS_NAME(quantise)(&call.key, &call.codes, call.center, call.batches, call.kv_heads, call.newest, call.newest + 1, 1);

    float *query = scratch<float, 2>(call.batches * call.heads * dim), *buffer = scratch<float, 3>(dim);
    int64_t most_kept = 0, most_seen = 0, last_stop = 0;
    for (int64_t batch = 0; batch < call.batches; batch++) {
        most_seen = std::max(most_seen, call.stop[batch] - call.first[batch]);
        last_stop = std::max(last_stop, call.stop[batch]);
        for (int64_t head = 0; head < call.heads; head++) {
            most_kept = std::max(most_kept, call.budget[batch * call.budget_batch + head * call.budget_head]);
            const float *from = call.query.vector(batch, head, 0, buffer);
            float *to = query + (batch * call.heads + head) * dim;
            for (int64_t i = 0; i < dim; i++) to[i] = from[i] * float(call.scaling);
        }
    }

    // As many keys as any group may come to: its first and recent ones, and those of the past.
    const int64_t near = std::min(call.sink_keys + std::max<int64_t>(1, call.recent_keys), last_stop);
    const int64_t width = round_up(near, TILE) + round_up(std::min(most_kept, most_seen), TILE);
    int64_t *positions = scratch<int64_t, 4>(groups * width);
    int64_t *runs = scratch<int64_t, 5>(call.batches * call.heads * RUNS * 2);
    const Selecting selecting{call.codes, dim, query, call.first, call.stop, call.budget, call.budget_batch,
                              call.budget_head, 0, call.batches, call.heads, call.kv_heads, 1, 1, call.sink_keys,
                              call.recent_keys, call.softcap, width, positions, runs, call.threads};
    HFS_NAME(select)(&selecting);
    const Attending attending{call.key, call.value, query, call.batches, call.heads, call.kv_heads, 1, 1, width, 0,
                              positions, nullptr, runs, call.sinks, call.softcap, call.out, call.threads};
    HFS_NAME(attend)(&attending);
}
