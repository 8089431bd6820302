// The kernels on calls from a file, for a CPU that is emulated: `driver CALLS RESULTS`. See `tests/test_emulated.py`, which
// writes the one and reads the other. A call is its `Header`, then the arrays that are read below, in that order. Prints
// the target in use.

#define HFS hfs
#include "calls.hpp"

#include <cstdio>
#include <cstdlib>

using namespace hfs;

extern "C" const char *hfs_target();
extern "C" void hfs_quantise(const States *, const QuantisedKeys *, const float *, int64_t, int64_t, int64_t, int64_t, int64_t);
extern "C" void hfs_select(const Selecting *);
extern "C" void hfs_attend(const Attending *);
extern "C" void hfs_decode(const Decoding *);

struct Header {
    int64_t batches, heads, kv_heads, q_len, kv_len, dim, value_dim, format;
    int64_t size, width, sink_keys, recent_keys;      // for selecting
    int64_t attended_size, attended_width, per_head, masked; // for attention, to other keys
    double softcap;
};

static FILE *calls, *results;

template <typename T> static std::vector<T> read(int64_t count) {
    std::vector<T> out(count);
    if (fread(out.data(), sizeof(T), count, calls) != size_t(count)) std::exit(3);
    return out;
}

template <typename T> static void write(const std::vector<T> &x) { fwrite(x.data(), sizeof(T), x.size(), results); }

static void run(const Header &h) {
    const int64_t item = h.format == FLOAT32 ? 4 : h.format == INT8 ? 1 : 2, sequences = h.batches * h.kv_heads, share = h.heads / h.kv_heads;
    const auto key_bytes = read<uint8_t>(sequences * h.kv_len * h.dim * item);
    const auto value_bytes = read<uint8_t>(sequences * h.kv_len * h.value_dim * item);
    const bool scaled = h.format == INT8;
    const auto parts = [](int64_t dim) { return dim % 32 ? 1 : dim / 32; };
    const auto key_scales = read<uint16_t>(scaled ? sequences * h.kv_len * parts(h.dim) : 0);
    const auto value_scales = read<uint16_t>(scaled ? sequences * h.kv_len * parts(h.value_dim) : 0);
    const auto center = read<float>(sequences * h.dim);
    const auto query = read<float>(h.batches * h.heads * h.q_len * h.dim);
    const auto first = read<int64_t>(h.batches * h.q_len), stop = read<int64_t>(h.batches * h.q_len);
    const auto budget = read<int64_t>(h.batches * h.heads * h.q_len);
    const int64_t attended_groups = sequences * (h.per_head ? share : 1) * (h.q_len / h.attended_size);
    const int64_t attended_pairs = attended_groups * (h.per_head ? 1 : share) * h.attended_size;
    const auto attended = read<int64_t>(attended_groups * h.attended_width);
    const auto allowed = read<uint8_t>(h.masked ? attended_pairs * h.attended_width : 0);
    const auto attended_runs = read<int64_t>(h.masked ? 0 : attended_pairs * RUNS * 2);
    const auto states = [&](const std::vector<uint8_t> &bytes, const std::vector<uint16_t> &scales, int64_t dim) {
        const int64_t own = parts(dim);
        return States{bytes.data(), Format(h.format), h.kv_heads * h.kv_len * dim, h.kv_len * dim, dim, dim,
                      scales.data(), own, h.kv_heads * h.kv_len * own, h.kv_len * own, own};
    };
    const States key = states(key_bytes, key_scales, h.dim), value = states(value_bytes, value_scales, h.value_dim);

    const int64_t keys = round_up(h.kv_len, TILE), bytes = keys * h.dim / 2;
    std::vector<uint8_t> codes(sequences * bytes);
    std::vector<float> scales(sequences * keys);
    const QuantisedKeys quantised{codes.data(), scales.data(), h.kv_heads * bytes, bytes, h.kv_heads * keys, keys};
    hfs_quantise(&key, &quantised, center.data(), h.batches, h.kv_heads, 0, h.kv_len, 1);

    const int64_t groups = sequences * (h.q_len / h.size);
    std::vector<int64_t> positions(groups * h.width), runs(groups * share * h.size * RUNS * 2);
    const Selecting selecting{quantised, h.dim, query.data(), first.data(), stop.data(), budget.data(), h.heads * h.q_len,
                              h.q_len, 1, h.batches, h.heads, h.kv_heads, h.q_len, h.size, h.sink_keys, h.recent_keys,
                              h.softcap, h.width, positions.data(), runs.data(), 1};
    hfs_select(&selecting);

    std::vector<float> out(h.batches * h.heads * h.q_len * h.value_dim);
    const Attending attending{key, value, query.data(), h.batches, h.heads, h.kv_heads, h.q_len, h.attended_size,
                              h.attended_width, h.per_head, attended.data(), h.masked ? allowed.data() : nullptr,
                              h.masked ? nullptr : attended_runs.data(), nullptr, h.softcap, out.data(), 1};
    hfs_attend(&attending);

    if (h.q_len == 1) { // the same in one call, from scores to outputs
        std::vector<float> kept(out.size()), decoded(out.size());
        const Attending to_kept{key, value, query.data(), h.batches, h.heads, h.kv_heads, 1, 1, h.width, 0,
                                positions.data(), nullptr, runs.data(), nullptr, h.softcap, kept.data(), 1};
        hfs_attend(&to_kept);
        const int64_t newest = *std::max_element(stop.begin(), stop.end()) - 1;
        for (int64_t i = 0; i < sequences; i++) scales[i * keys + newest] = NAN; // to be written again
        const States plain{query.data(), FLOAT32, h.heads * h.dim, h.dim, h.dim, h.dim};
        const Decoding decoding{plain, 1, key, value, quantised, center.data(), newest, first.data(), stop.data(),
                                budget.data(), h.heads, 1, h.batches, h.heads, h.kv_heads, h.sink_keys, h.recent_keys,
                                nullptr, h.softcap, decoded.data(), 1};
        hfs_decode(&decoding);
        if (kept != decoded) std::exit(5);
    }
    write(codes), write(scales), write(positions), write(runs), write(out);
}

int main(int count, char **names) {
    if (count != 3 || !(calls = fopen(names[1], "rb")) || !(results = fopen(names[2], "wb"))) return 2;
    puts(hfs_target());
    for (Header header; fread(&header, sizeof header, 1, calls) == 1;) run(header);
    return fclose(results) == 0 ? 0 : 4;
}
