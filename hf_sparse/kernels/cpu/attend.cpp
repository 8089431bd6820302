// Attention of groups of (query, head) pairs to the keys they keep: an online softmax over tiles of gathered keys.

#include "amx.hpp"
#include "calls.hpp"

#include <algorithm>

using namespace HFS;

namespace {

constexpr int64_t CHUNK = 256; // keys that are gathered at a time
constexpr int64_t SCORED = 2 * LANES; // pairs whose scores are found together, one in each lane of two registers or one
// Keys whose scores are found together, and pairs that share loaded values: as many as registers hold.
#if defined(__aarch64__)
constexpr int64_t KEYS = 8, SUMMED = 8;
#else
constexpr int64_t KEYS = LANES > 8 ? 12 : 6, SUMMED = LANES > 8 ? 8 : 6;
#endif
constexpr int64_t LINE = 64 / sizeof(float); // numbers in a line of the cache
constexpr int64_t KEYS_AHEAD = 2 * KEYS, VALUES_AHEAD = 16; // what is prefetched, a line at a time, where it is read in a row
constexpr int64_t FEW = 4;    // pairs that read keys and values where they lie
constexpr int64_t PART = 512; // places of the list that a thread takes where all threads share one group, at least
constexpr int64_t MOST_PARTS = 64; // of a group, which one thread joins
constexpr float LOWEST = -1e38f; // below every score

// NaN, which the vector functions take for a small number, shows in the result, as in every other engine.
inline Floats capped_or_nan(Floats score, float cap) { return score == score ? capped(score, cap) : score; }

// The weight of a score relative to 2^base: 0 for a key that is not kept, whose score is -inf. Where no key was kept yet,
// `base` is -inf, too.
inline Floats weight_of(Floats score, Floats base) {
    const Floats power = score * LOG2_E - base;
    const Floats weight = power == power ? exp2(power) : power;
    return score <= all(LOWEST) ? Floats{} : weight;
}

// One group's pairs: running maximum, sum of weights and weighted values of each.
class Attention {
  public:
    Attention(const Attending &call, int64_t index)
        : call(call), share(call.heads / call.kv_heads), pairs(call.per_head ? call.size : share * call.size),
          groups(call.q_len / call.size), group(index % groups), first_head(index / groups * (call.per_head ? 1 : share)),
          kv_head(first_head / share % call.kv_heads), batch(first_head / call.heads),
          positions(call.positions + index * call.width),
          allowed(call.allowed ? call.allowed + index * pairs * call.width : nullptr),
          runs(call.runs ? call.runs + index * pairs * RUNS * 2 : nullptr),
          padded(round_up(call.value.dim, LANES)) {}

    // Size of the running softmax: for each pair the highest score, and relative to it the sums of weights and of
    // weighted values, with room for as many pairs as a matrix unit takes.
    int64_t room() const { return 2 * pairs + round_up(pairs, 16) * padded; }

    void start(float *state) {
        highest_of = state;
        total_of = highest_of + pairs;
        sum_of = total_of + pairs;
        std::fill(state, state + room(), 0.0f);
        std::fill(highest_of, highest_of + pairs, -INFINITY);
    }

    // Attend to the places in [from, to) of the list.
    void attend(int64_t from, int64_t to) {
        find_used(from, to);
#if defined(HFS_AMX)
        if (by_matrix_unit()) return attend_by_matrix_unit();
#endif
        if (pairs > FEW) turn();
        const int64_t step = CHUNK / LANES;
        for (int64_t at = 0; at < used_count; at += step) {
            const int64_t count = std::min(step, used_count - at);
            int64_t *own = scratch<int64_t, 15>(CHUNK);
            for (int64_t i = 0; i < count * LANES; i++) own[i] = positions[used[at + i / LANES] + i % LANES];
            if (pairs <= FEW)
                attend_in_place(at, count, own);
            else
                attend_to_copies(at, count, own);
        }
    }

    // Add the running softmax of another part of the same group.
    void add(const Attention &other) {
        for (int64_t p = 0; p < pairs; p++) {
            if (other.total_of[p] == 0) continue;
            raise(p, other.highest_of[p]);
            const float factor = std::exp(other.highest_of[p] - highest_of[p]);
            total_of[p] += other.total_of[p] * factor;
            for (int64_t i = 0; i < padded; i++) sum_of[p * padded + i] += other.sum_of[p * padded + i] * factor;
        }
    }

    void finish() {
        for (int64_t p = 0; p < pairs; p++) finish(p);
    }

  private:
    const Attending &call;
    const int64_t share, pairs, groups, group;
    const int64_t first_head; // counted over the batch
    const int64_t kv_head, batch;
    const int64_t *positions;
    const uint8_t *allowed;
    const int64_t *runs;
    const int64_t padded; // components of a value, a multiple of LANES
    float *highest_of, *total_of, *sum_of;
    float *queries;
    int64_t *used; // tiles of `positions` from which some pair keeps a key
    int64_t used_count = 0;

    int64_t head_of(int64_t p) const { return first_head % call.heads + p / call.size; }
    int64_t at(int64_t p) const {
        return (first_head + p / call.size) * call.q_len + group * call.size + p % call.size;
    }

    void find_used(int64_t from, int64_t to) {
        used = scratch<int64_t, 13>((to - from) / LANES);
        used_count = 0;
        for (int64_t i = from; i < to; i += LANES)
            if (any_keeps(i)) used[used_count++] = i;
    }

    bool any_keeps(int64_t place) const {
        if (runs) {
            for (int64_t p = 0; p < pairs; p++)
                if (keeps(p, place, LANES)) return true;
            return false;
        }
        Bytes any{};
        for (int64_t p = 0; p < pairs; p++) any |= load_bytes(allowed + p * call.width + place);
        return bits(__builtin_convertvector(any, Ints)) != 0;
    }

    // Whether a run of pair p has one of `count` places from `place` on.
    bool keeps(int64_t p, int64_t place, int64_t count) const {
        const int64_t *run = runs + p * RUNS * 2;
        for (int64_t r = 0; r < RUNS; r++)
            if (run[2 * r] < std::min(run[2 * r + 1], place + count) && run[2 * r + 1] > place) return true;
        return false;
    }

    // Which of LANES places from `place` on pair p keeps.
    Ints kept(int64_t p, int64_t place) const {
        if (!runs) return from_bytes(allowed + p * call.width + place);
        const int64_t *run = runs + p * RUNS * 2;
        Ints yes{};
        for (int64_t r = RUNS - 1; r >= 0; r--) {
            if (run[2 * r] <= place && place + LANES <= run[2 * r + 1]) return yes - 1;
            if (run[2 * r] >= place + LANES || run[2 * r + 1] <= place) continue;
            const Ints at = counting(place);
            yes |= (at >= int32_t(run[2 * r])) & (at < int32_t(run[2 * r + 1]));
        }
        return yes;
    }

    // The keys and values at `own`, which are those of `count` used tiles from `from` on.
    void attend_in_place(int64_t from, int64_t count, const int64_t *own) {
        const int64_t width = count * LANES, dim = call.key.dim;
        float *weights = scratch<float, 19>(FEW * CHUNK);
        const float *queries[FEW];
        for (int64_t p = 0; p < pairs; p++) queries[p] = call.query + at(p) * dim;
        find_few_scores(queries, own, width, weights);
        for (int64_t p = 0; p < pairs; p++) weigh(p, used + from, count, weights + p * CHUNK);
        const bool direct = call.value.format == FLOAT32 && padded == call.value.dim;
        float *copies = scratch<float, 17>(direct ? 0 : CHUNK * padded);
        const float *values[CHUNK];
        for (int64_t i = 0; i < width; i++) {
            values[i] = direct ? call.value.vector(batch, kv_head, own[i], nullptr) : value(own[i], copies + i * padded);
        }
        for (int64_t p = 0; p < pairs; p++) {
            int64_t part = 0;
            for (; padded - part >= 4 * LANES; part += 4 * LANES)
                add_in_place<4>(p, weights + p * CHUNK, values, width, part);
            for (; part < padded; part += LANES) add_in_place<1>(p, weights + p * CHUNK, values, width, part);
        }
    }

    // Scores (pairs, CHUNK) for the keys at `own`, whose values are wanted next.
    void find_few_scores(const float *const *queries, const int64_t *own, int64_t width, float *out) const {
        const int64_t dim = call.key.dim;
        float *buffer = scratch<float, 1>(dim);
        for (int64_t i = 0; i < width; i++) {
            if (i + VECTORS_AHEAD < width) call.key.prefetch(batch, kv_head, own[i + VECTORS_AHEAD]);
            call.value.prefetch(batch, kv_head, own[i]);
            const float *vector = call.key.vector(batch, kv_head, own[i], buffer);
            for (int64_t p = 0; p < pairs; p++) {
                Floats sums{};
                int64_t j = 0;
                for (; j + LANES <= dim; j += LANES) sums += load(vector + j) * load(queries[p] + j);
                float score = sum(sums);
                for (; j < dim; j++) score += vector[j] * queries[p][j];
                out[p * CHUNK + i] = score;
            }
        }
    }

    template <int parts>
    void add_in_place(int64_t p, const float *weights, const float *const *values, int64_t count, int64_t part) {
        Floats sums[parts];
        float *to = sum_of + p * padded + part;
        for (int j = 0; j < parts; j++) sums[j] = load(to + j * LANES);
        for (int64_t i = 0; i < count; i++) {
            if (weights[i] == 0) continue;
            for (int j = 0; j < parts; j++) sums[j] += load(values[i] + part + j * LANES) * weights[i];
        }
        for (int j = 0; j < parts; j++) store(to + j * LANES, sums[j]);
    }

    // A copy of a value, and zeros behind it.
    const float *value(int64_t position, float *to) const {
        copy(call.value, position, to);
        std::fill(to + call.value.dim, to + padded, 0.0f);
        return to;
    }

    void copy(const States &states, int64_t position, float *to) const {
        const float *vector = states.vector(batch, kv_head, position, to);
        if (vector != to) std::copy(vector, vector + states.dim, to);
    }

    // The keys or values at `own`, if that is where they lie in memory one after the other as floats; else null.
    const float *in_a_row(const States &states, const int64_t *own, int64_t width) const {
        if (states.format != FLOAT32 || states.position_stride != states.dim) return nullptr;
        for (int64_t i = 1; i < width; i++)
            if (own[i] != own[0] + i) return nullptr;
        return states.vector(batch, kv_head, own[0], nullptr);
    }

    // Queries, turned: (sets, dim, SCORED).
    void turn() {
        const int64_t dim = call.key.dim, sets = (pairs + SCORED - 1) / SCORED;
        queries = scratch<float, 14>(sets * dim * SCORED);
        std::fill(queries, queries + sets * dim * SCORED, 0.0f);
        for (int64_t p = 0; p < pairs; p++) {
            const float *query = call.query + at(p) * dim;
            for (int64_t j = 0; j < dim; j++) queries[(p / SCORED * dim + j) * SCORED + p % SCORED] = query[j];
        }
    }

    // The same for many pairs, which share copies of the keys and values, or read those that lie in a row.
    void attend_to_copies(int64_t from, int64_t count, const int64_t *own) {
        const int64_t width = count * LANES, dim = call.key.dim;
        const int64_t room = round_up(CHUNK, KEYS);
        float *copies = scratch<float, 16>(room * dim), *copied = scratch<float, 17>(CHUNK * padded);
        const float *keys = in_a_row(call.key, own, width), *values = in_a_row(call.value, own, width);
        if (padded != call.value.dim) values = nullptr;
        for (int64_t i = keys ? width / KEYS * KEYS : 0; i < width; i++) {
            if (!keys && i + VECTORS_AHEAD < width) call.key.prefetch(batch, kv_head, own[i + VECTORS_AHEAD]);
            copy(call.key, own[i], copies + i * dim);
        }
        for (int64_t i = 0; !values && i < width; i++) {
            if (i + VECTORS_AHEAD < width) call.value.prefetch(batch, kv_head, own[i + VECTORS_AHEAD]);
            value(own[i], copied + i * padded);
        }
        float *weights = scratch<float, 19>(room * SCORED);
        for (int64_t set = 0; set < pairs; set += SCORED) {
            const int64_t number = std::min(SCORED, pairs - set);
            for (int64_t i = 0; i < width; i += KEYS) {
                const bool in_memory = keys && i + KEYS <= width;
                const auto find = number > LANES ? in_memory ? find_scores<2, true> : find_scores<2, false>
                                  : in_memory    ? find_scores<1, true>
                                                 : find_scores<1, false>;
                find(queries + set * dim, (in_memory ? keys : copies) + i * dim, dim, weights + i * SCORED);
            }
            weigh_set(set, number, used + from, width, weights);
            for (int64_t p = 0; p < number; p += SUMMED) {
                const int64_t summed = std::min(SUMMED, number - p);
                int64_t part = 0;
                for (; padded - part >= 2 * LANES; part += 2 * LANES)
                    if (values)
                        add_values<2, true>(set + p, summed, weights + p, values, width, part);
                    else
                        add_values<2, false>(set + p, summed, weights + p, copied, width, part);
                if (part < padded) add_values<1, false>(set + p, summed, weights + p, values ? values : copied, width, part);
            }
        }
    }

#if defined(HFS_AMX)
    bool by_matrix_unit() const {
        return pairs >= amx::ROWS && call.key.format == BFLOAT16 && call.value.format == BFLOAT16;
    }

    void attend_by_matrix_unit() {
        const amx::Registers registers;
        const int64_t dim = call.key.dim, inner = round_up(dim, amx::INNER), sets = round_up(pairs, amx::ROWS);
        uint16_t *high = scratch<uint16_t, 30>(sets * inner), *low = scratch<uint16_t, 31>(sets * inner);
        float *query = scratch<float, 32>(inner);
        std::fill(query, query + inner, 0.0f);
        for (int64_t p = 0; p < sets; p++) {
            if (p < pairs) std::copy(call.query + at(p) * dim, call.query + at(p) * dim + dim, query);
            for (int64_t j = 0; j < inner; j += LANES) amx::split(load(query + j), high + p * inner + j, low + p * inner + j);
        }
        const int64_t step = CHUNK / LANES;
        for (int64_t from = 0; from < used_count; from += step)
            attend_by_matrix_unit({high, low, inner}, from, std::min(step, used_count - from));
    }

    // The keys and values of `count` used tiles from `from` on.
    void attend_by_matrix_unit(const amx::Terms &queries, int64_t from, int64_t count) {
        const int64_t width = count * LANES, weighed = round_up(width, amx::INNER);
        uint16_t *keys = scratch<uint16_t, 33>(CHUNK * queries.inner), *values = scratch<uint16_t, 34>(CHUNK * padded);
        for (int64_t i = 0; i < count; i++) {
            const int64_t *own = positions + used[from + i];
            for (int64_t key = 0; i + 1 < count && key < LANES; key++) {
                const int64_t next = positions[used[from + i + 1] + key];
                call.key.prefetch(batch, kv_head, next);
                call.value.prefetch(batch, kv_head, next);
            }
            const auto key_of = [&](int64_t key) { return call.key.words(batch, kv_head, own[key]); };
            amx::turn(key_of, call.key.dim, queries.inner, keys + i * LANES * 2, CHUNK);
            for (int64_t key = 0; key < LANES; key += 2)
                amx::interleave(call.value.words(batch, kv_head, own[key]), call.value.words(batch, kv_head, own[key + 1]),
                                call.value.dim, padded, values + (i * LANES + key) * padded);
        }
        std::fill(values + width * padded, values + weighed * padded, 0);
        float *scores = scratch<float, 35>(amx::ROWS * CHUNK);
        uint16_t *high = scratch<uint16_t, 36>(amx::ROWS * CHUNK), *low = scratch<uint16_t, 37>(amx::ROWS * CHUNK);
        for (int64_t set = 0; set < pairs; set += amx::ROWS) {
            const int64_t before = set * queries.inner, number = std::min(amx::ROWS, pairs - set);
            const amx::Terms own{queries.high + before, queries.low + before, queries.inner};
            amx::multiply(own, keys, CHUNK, width, false, scores, CHUNK);
            for (int64_t p = 0; p < amx::ROWS; p++) {
                if (p < number) weigh(set + p, used + from, count, scores + p * CHUNK);
                for (int64_t i = 0; i < weighed; i += LANES) {
                    const Floats weights = p < number && i < width ? load(scores + p * CHUNK + i) : Floats{};
                    amx::split(weights, high + p * weighed + i, low + p * weighed + i);
                }
            }
            amx::multiply({high, low, weighed}, values, padded, padded, true, sum_of + set * padded, padded);
        }
    }
#endif

    // Scores (KEYS, SCORED) of a set of pairs, which fill so many registers, for as many keys.
    template <int registers, bool in_memory>
    static void find_scores(const float *queries, const float *keys, int64_t dim, float *out) {
        Floats sums[KEYS][registers] = {};
        for (int64_t j = 0; j < dim; j++) {
            if (in_memory) __builtin_prefetch(keys + KEYS_AHEAD * dim + j * LINE);
            Floats query[registers];
            for (int r = 0; r < registers; r++) query[r] = load(queries + j * SCORED + r * LANES);
            for (int64_t i = 0; i < KEYS; i++) {
                const Floats key = all(keys[i * dim + j]);
                for (int r = 0; r < registers; r++) sums[i][r] += query[r] * key;
            }
        }
        for (int64_t i = 0; i < KEYS; i++)
            for (int r = 0; r < registers; r++) store(out + i * SCORED + r * LANES, sums[i][r]);
    }

    // Scores -> weights of the kept keys of a set of pairs, (width, SCORED), relative to the highest score so far.
    void weigh_set(int64_t set, int64_t number, const int64_t *places, int64_t width, float *weights) {
        const float softcap = float(call.softcap);
        float *kept_of = nullptr; // 1 and 0, (width, SCORED), unless all pairs keep all keys
        if (!all_keep(set, number, places, width)) kept_of = kept_by(set, number, places, width);
        for (int64_t half = 0; half < number; half += LANES) {
            Floats most = all(-INFINITY);
            for (int64_t i = 0; i < width; i++) {
                Floats score = load(weights + i * SCORED + half);
                if (softcap > 0) score = capped_or_nan(score, softcap);
                if (kept_of) score = load(kept_of + i * SCORED + half) > 0 ? score : all(-INFINITY);
                store(weights + i * SCORED + half, score);
                most = larger(most, score);
            }
            Floats base;
            for (int64_t p = 0; p < LANES; p++) {
                if (half + p < number) raise(set + half + p, most[p]);
                base[p] = half + p < number ? highest_of[set + half + p] * LOG2_E : INFINITY;
            }
            Floats total{};
            for (int64_t i = 0; i < width; i++) {
                const Floats weight = weight_of(load(weights + i * SCORED + half), base);
                store(weights + i * SCORED + half, weight);
                total += weight;
            }
            for (int64_t p = 0; p < LANES && half + p < number; p++) total_of[set + half + p] += total[p];
        }
    }

    bool all_keep(int64_t set, int64_t number, const int64_t *places, int64_t width) const {
        if (!runs) return false;
        const int64_t first = places[0], stop = places[width / LANES - 1] + LANES;
        for (int64_t p = set; p < set + number; p++) {
            const int64_t *run = runs + p * RUNS * 2;
            if (run[2 * RUNS - 2] > first || run[2 * RUNS - 1] < stop) return false;
        }
        return true;
    }

    float *kept_by(int64_t set, int64_t number, const int64_t *places, int64_t width) const {
        float *out = scratch<float, 24>(CHUNK * SCORED);
        std::fill(out, out + width * SCORED, 0.0f);
        if (runs)
            for (int64_t run = 0; run < RUNS; run++) add_run(set, number, run, places, width, out);
        else
            for (int64_t p = 0; p < number; p++)
                for (int64_t i = 0; i < width; i++)
                    out[i * SCORED + p] = allowed[(set + p) * call.width + places[i / LANES] + i % LANES];
        return out;
    }

    // Add 1 for the places that lie in that run of a pair. Runs do not overlap.
    void add_run(int64_t set, int64_t number, int64_t run, const int64_t *places, int64_t width, float *out) const {
        for (int64_t half = 0; half < number; half += LANES) {
            Ints first{}, stop{};
            for (int64_t p = 0; p < std::min<int64_t>(LANES, number - half); p++) {
                const int64_t *bounds = runs + ((set + half + p) * RUNS + run) * 2;
                first[p] = int32_t(bounds[0]), stop[p] = int32_t(bounds[1]);
            }
            for (int64_t i = 0; i < width; i++) {
                const Ints place = Ints{} + int32_t(places[i / LANES] + i % LANES);
                const Floats one = (place >= first) & (place < stop) ? all(1.0f) : Floats{};
                store(out + i * SCORED + half, load(out + i * SCORED + half) + one);
            }
        }
    }

    // Scores -> weights of the allowed keys, relative to the highest score so far.
    void weigh(int64_t p, const int64_t *places, int64_t count, float *weights) {
        const float softcap = float(call.softcap);
        Floats most = all(-INFINITY);
        for (int64_t i = 0; i < count; i++) {
            Floats score = load(weights + i * LANES);
            if (softcap > 0) score = capped_or_nan(score, softcap);
            score = kept(p, places[i]) ? score : all(-INFINITY);
            store(weights + i * LANES, score);
            most = larger(most, score);
        }
        raise(p, highest(most));
        const float base = highest_of[p] * LOG2_E;
        Floats total{};
        for (int64_t i = 0; i < count; i++) {
            const Floats weight = weight_of(load(weights + i * LANES), all(base));
            store(weights + i * LANES, weight);
            total += weight;
        }
        total_of[p] += sum(total);
    }

    // Make weights relative to `score` if it is the highest so far.
    void raise(int64_t p, float score) {
        if (!(score > highest_of[p])) return; // NaN is not
        const float change = std::exp(highest_of[p] - score);
        total_of[p] *= change;
        for (int64_t i = 0; i < padded; i++) sum_of[p * padded + i] *= change;
        highest_of[p] = score;
    }

    template <int parts, bool in_memory>
    void add_values(int64_t set, int64_t number, const float *weights, const float *values, int64_t count, int64_t part) {
        Floats sums[SUMMED][parts] = {};
        for (int64_t i = 0; i < count; i++) {
            Floats value[parts];
            for (int j = 0; j < parts; j++) value[j] = load(values + i * padded + part + j * LANES);
            for (int j = 0; in_memory && j < parts; j++)
                __builtin_prefetch(values + (i + VALUES_AHEAD) * padded + part + j * LANES);
            for (int64_t p = 0; p < SUMMED; p++)
                for (int j = 0; j < parts; j++) sums[p][j] += value[j] * weights[i * SCORED + p];
        }
        for (int64_t p = 0; p < number; p++)
            for (int j = 0; j < parts; j++) {
                float *to = sum_of + (set + p) * padded + part + j * LANES;
                store(to, load(to) + sums[p][j]);
            }
    }

    void finish(int64_t p) {
        float *to = call.out + at(p) * call.value.dim;
        float total = total_of[p], factor = 1;
        if (call.sinks && total != 0) {
            const float sink = call.sinks[head_of(p)], most = std::max(sink, highest_of[p]);
            factor = std::exp(highest_of[p] - most);
            total = total * factor + std::exp(sink - most);
        }
        const float share = total != 0 ? factor / total : 0.0f; // NaN stays NaN
        for (int64_t i = 0; i < call.value.dim; i++) to[i] = sum_of[p * padded + i] * share;
    }
};

// Few groups of one query, as in decoding: the threads share the keys of each group.
void attend_to_few(const Attending &call, int64_t groups) {
    const int64_t part = std::max(PART, round_up((call.width + MOST_PARTS - 1) / MOST_PARTS, LANES));
    const int64_t pieces = std::max<int64_t>(1, (call.width + part - 1) / part);
    std::vector<Attention> parts;
    for (int64_t i = 0; i < groups * pieces; i++) parts.emplace_back(call, i / pieces);
    const int64_t room = parts[0].room();
    std::vector<float> states(parts.size() * room);
    in_parallel(parts.size(), call.threads, [&](int64_t i) {
        const int64_t from = i % pieces * part;
        parts[i].start(states.data() + i * room);
        parts[i].attend(from, std::min(from + part, call.width));
    });
    for (size_t i = 0; i < parts.size(); i += pieces) {
        for (int64_t piece = 1; piece < pieces; piece++) parts[i].add(parts[i + piece]);
        parts[i].finish();
    }
}

} // namespace

extern "C" void HFS_NAME(attend)(const Attending *call) {
    const int64_t groups = call->batches * (call->per_head ? call->heads : call->kv_heads) * (call->q_len / call->size);
    if (call->q_len == 1 && groups > 0) return attend_to_few(*call, groups);
    in_parallel(groups, call->threads, [&](int64_t index) {
        Attention attention(*call, index);
        attention.start(scratch<float, 10>(attention.room()));
        attention.attend(0, call->width);
        attention.finish();
    });
}
