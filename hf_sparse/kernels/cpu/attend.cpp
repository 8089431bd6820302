// Attention of groups of rows to the columns that they keep: an online softmax over tiles of gathered keys.

#include "scores.hpp"

#include <algorithm>

using namespace hfs;

namespace {

struct Call {
    States key, value;
    const float *query; // (batch, heads, rows, dim), contiguous, scaled
    int64_t batches, heads, kv_heads, rows, size, width;
    int64_t per_head; // whether a group holds rows of one head, and not of all that share keys
    const int64_t *columns;  // (batch, kv_heads, groups, width); if `per_head`, groups go by head, then row
    const uint8_t *allowed;  // (batch, kv_heads, groups, members, width)
    const float *scores;     // like `allowed`, or null: they are worked out here
    const float *sinks;      // (heads) logits without a value, or null
    double softcap;          // 0 for none
    float *out;              // (batch, heads, rows, value.dim), contiguous
    int64_t threads;
};

constexpr int64_t CHUNK = 256; // columns that are gathered at a time
constexpr int64_t TOGETHER = SHARING > 8 ? 8 : SHARING; // members that share what is loaded
constexpr int64_t PART = 512;   // columns that a thread takes at a time where all threads share one group
constexpr float LOWEST = -1e38f; // below every score

// One group's members: running maximum, sum of weights and weighted values of each.
class Attention {
  public:
    Attention(const Call &call, int64_t index)
        : call(call), share(call.heads / call.kv_heads), members(call.per_head ? call.size : share * call.size),
          groups(call.rows / call.size), group(index % groups), first_head(index / groups * (call.per_head ? 1 : share)),
          kv_head(first_head / share % call.kv_heads), batch(first_head / call.heads),
          columns(call.columns + index * call.width),
          allowed(call.allowed + index * members * call.width),
          scores(call.scores ? call.scores + index * members * call.width : nullptr),
          padded(round_up(call.value.dim, LANES)) {}

    // Numbers that hold what was attended to so far: of each member the highest score, and relative to it the sum of
    // weights and that of weighted values.
    int64_t room() const { return members * (2 + padded); }

    void start(float *state) {
        highest_of = state;
        total_of = highest_of + members;
        sum_of = total_of + members;
        std::fill(state, state + room(), 0.0f);
        std::fill(highest_of, highest_of + members, -INFINITY);
    }

    // Attend to the columns in [from, to) of the list.
    void attend(int64_t from, int64_t to) {
        find_used(from, to);
        const int64_t step = CHUNK / LANES;
        for (int64_t at = 0; at < used_count; at += step) attend_to_used(at, std::min(step, used_count - at));
    }

    // Add what another one attended to, of the same group.
    void add(const Attention &other) {
        for (int64_t m = 0; m < members; m++) {
            if (other.highest_of[m] == -INFINITY) continue;
            raise(m, other.highest_of[m]);
            const float factor = std::exp(other.highest_of[m] - highest_of[m]);
            total_of[m] += other.total_of[m] * factor;
            for (int64_t i = 0; i < padded; i++) sum_of[m * padded + i] += other.sum_of[m * padded + i] * factor;
        }
    }

    void finish() {
        for (int64_t m = 0; m < members; m++) finish(m);
    }

  private:
    const Call &call;
    const int64_t share, members, groups, group;
    const int64_t first_head; // counted over the batch
    const int64_t kv_head, batch;
    const int64_t *columns;
    const uint8_t *allowed;
    const float *scores;
    const int64_t padded; // components of a value, a multiple of LANES
    float *highest_of, *total_of, *sum_of;
    int64_t *used; // where in `columns` tiles begin of which some member is allowed some
    int64_t used_count = 0;

    int64_t head_of(int64_t m) const { return first_head % call.heads + m / call.size; }
    int64_t at(int64_t m) const {
        return (first_head + m / call.size) * call.rows + group * call.size + m % call.size;
    }

    void find_used(int64_t from, int64_t to) {
        used = scratch<int64_t, 13>((to - from) / LANES);
        used_count = 0;
        for (int64_t i = from; i < to; i += LANES) {
            Bytes any{};
            for (int64_t m = 0; m < members; m++) any |= load_bytes(allowed + m * call.width + i);
            if (bits(__builtin_convertvector(any, Ints)) != 0) used[used_count++] = i;
        }
    }

    void attend_to_used(int64_t from, int64_t count) {
        const int64_t width = count * LANES, dim = call.key.dim;
        int64_t *own = scratch<int64_t, 15>(CHUNK);
        for (int64_t i = 0; i < width; i++) own[i] = columns[used[from + i / LANES] + i % LANES];
        float *turned = scratch<float, 16>(CHUNK * dim);
        if (!scores) turn_keys(call.key, batch, kv_head, own, width, turned);
        float *values = scratch<float, 17>(CHUNK * padded), *buffer = scratch<float, 18>(call.value.dim);
        for (int64_t i = 0; i < width; i++) {
            if (i + ROWS_AHEAD < width) call.value.prefetch(batch, kv_head, own[i + ROWS_AHEAD]);
            const float *row = call.value.row(batch, kv_head, own[i], buffer);
            std::copy(row, row + call.value.dim, values + i * padded);
            std::fill(values + i * padded + call.value.dim, values + (i + 1) * padded, 0.0f);
        }
        float *weights = scratch<float, 19>(TOGETHER * CHUNK);
        for (int64_t set = 0; set < members; set += TOGETHER) {
            const int64_t number = std::min(TOGETHER, members - set);
            if (!scores) {
                const float *queries[TOGETHER];
                for (int64_t m = 0; m < TOGETHER; m++) queries[m] = call.query + at(std::min(set + m, members - 1)) * dim;
                turned_scores<TOGETHER>(queries, turned, dim, width, weights, CHUNK);
            }
            for (int64_t m = 0; m < number; m++) weigh(set + m, used + from, count, weights + m * CHUNK);
            for (int64_t m = number; m < TOGETHER; m++) std::fill(weights + m * CHUNK, weights + (m + 1) * CHUNK, 0.0f);
            int64_t part = 0;
            for (; padded - part >= 2 * LANES; part += 2 * LANES)
                add_values<2>(set, number, weights, values, width, part);
            if (part < padded) add_values<1>(set, number, weights, values, width, part);
        }
    }

    // Scores -> weights of the allowed columns relative to the highest score so far.
    void weigh(int64_t m, const int64_t *places, int64_t count, float *weights) {
        const uint8_t *may = allowed + m * call.width;
        const float *known = scores ? scores + m * call.width : nullptr;
        const float softcap = float(call.softcap);
        Floats most = all(-INFINITY);
        for (int64_t i = 0; i < count; i++) {
            Floats score = load(known ? known + places[i] : weights + i * LANES);
            if (softcap > 0) score = capped(score, softcap);
            score = from_bytes(may + places[i]) ? score : all(-INFINITY);
            store(weights + i * LANES, score);
            most = larger(most, score);
        }
        raise(m, highest(most));
        const float base = highest_of[m] * LOG2_E;
        Floats total{};
        for (int64_t i = 0; i < count; i++) {
            const Floats score = load(weights + i * LANES);
            // Also where no key was allowed yet: the difference is no number then, and is not used.
            const Floats weight = score > all(LOWEST) ? exp2<false>(score * LOG2_E - base) : Floats{};
            store(weights + i * LANES, weight);
            total += weight;
        }
        total_of[m] += sum(total);
    }

    // Measure weights from `score` if it is higher than all so far.
    void raise(int64_t m, float score) {
        if (score <= highest_of[m]) return;
        const float change = std::exp(highest_of[m] - score);
        total_of[m] *= change;
        for (int64_t i = 0; i < padded; i++) sum_of[m * padded + i] *= change;
        highest_of[m] = score;
    }

    template <int parts>
    void add_values(int64_t set, int64_t number, const float *weights, const float *values, int64_t count, int64_t part) {
        Floats sums[TOGETHER][parts] = {};
        for (int64_t i = 0; i < count; i++) {
            Floats value[parts];
            for (int p = 0; p < parts; p++) value[p] = load(values + i * padded + part + p * LANES);
            for (int64_t m = 0; m < TOGETHER; m++)
                for (int p = 0; p < parts; p++) sums[m][p] += value[p] * weights[m * CHUNK + i];
        }
        for (int64_t m = 0; m < number; m++)
            for (int p = 0; p < parts; p++) {
                float *to = sum_of + (set + m) * padded + part + p * LANES;
                store(to, load(to) + sums[m][p]);
            }
    }

    void finish(int64_t m) {
        float *to = call.out + at(m) * call.value.dim;
        float total = total_of[m], factor = 1;
        if (call.sinks && total > 0) {
            const float sink = call.sinks[head_of(m)], most = std::max(sink, highest_of[m]);
            factor = std::exp(highest_of[m] - most);
            total = total * factor + std::exp(sink - most);
        }
        const float share = total > 0 ? factor / total : 0.0f;
        for (int64_t i = 0; i < call.value.dim; i++) to[i] = sum_of[m * padded + i] * share;
    }
};

// Few groups of few rows, as in decoding: the threads share the columns of each group.
void attend_to_few(const Call &call, int64_t groups) {
    const int64_t pieces = std::max<int64_t>(1, (call.width + PART - 1) / PART);
    std::vector<Attention> parts;
    for (int64_t i = 0; i < groups * pieces; i++) parts.emplace_back(call, i / pieces);
    const int64_t room = parts[0].room();
    std::vector<float> states(parts.size() * room);
    in_parallel(parts.size(), call.threads, [&](int64_t i) {
        const int64_t from = i % pieces * PART;
        parts[i].start(states.data() + i * room);
        parts[i].attend(from, std::min(from + PART, call.width));
    });
    for (size_t i = 0; i < parts.size(); i += pieces) {
        for (int64_t piece = 1; piece < pieces; piece++) parts[i].add(parts[i + piece]);
        parts[i].finish();
    }
}

} // namespace

extern "C" void hfs_attend(const Call *call) {
    const int64_t groups = call->batches * (call->per_head ? call->heads : call->kv_heads) * (call->rows / call->size);
    if (call->rows == 1 && groups > 0) return attend_to_few(*call, groups);
    in_parallel(groups, call->threads, [&](int64_t index) {
        Attention attention(*call, index);
        attention.start(scratch<float, 10>(attention.room()));
        attention.attend(0, call->width);
        attention.finish();
    });
}
