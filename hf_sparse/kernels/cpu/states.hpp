// Keys and values as PyTorch keeps them, and the work of a call cut into tasks for threads.
#pragma once

#include "vectors.hpp"

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace HFS {

enum Format : int64_t { FLOAT32, BFLOAT16, FLOAT16, INT8 };

// (batch, kv_heads, length, dim); strides in elements, that of the last dimension 1. In 8 bits, parts of
// a vector are whole numbers times a scale.
struct States {
    const void *data;
    Format format;
    int64_t batch_stride, head_stride, position_stride;
    int64_t dim;
    const uint16_t *scales = nullptr; // of INT8, in bfloat16: (batch, kv_heads, length, parts), the last stride 1
    int64_t parts = 1, scale_batch = 0, scale_head = 0, scale_position = 0;

    // The key or value at `position` of a sequence and head, as floats: in place, or copied to `buffer`.
    const float *vector(int64_t batch, int64_t head, int64_t position, float *buffer) const {
        int64_t at = batch * batch_stride + head * head_stride + position * position_stride;
        if (format == FLOAT32) return static_cast<const float *>(data) + at;
        if (format == INT8) {
            const int8_t *codes = static_cast<const int8_t *>(data) + at;
            const uint16_t *own = scales_of(batch, head, position);
            for (int64_t part = 0, size = dim / parts; part < parts; part++) {
                const float scale = from_word(uint32_t(own[part]) << 16);
                for (int64_t i = part * size; i < (part + 1) * size; i++) buffer[i] = codes[i] * scale;
            }
            return buffer;
        }
        const uint16_t *from = static_cast<const uint16_t *>(data) + at;
        if (format == BFLOAT16)
            for (int64_t i = 0; i < dim; i++) buffer[i] = from_word(uint32_t(from[i]) << 16);
        else
            for (int64_t i = 0; i < dim; i++) buffer[i] = from_float16(from[i]);
        return buffer;
    }

    // The same of 16 bits a number, where it lies.
    const uint16_t *words(int64_t batch, int64_t head, int64_t position) const {
        return static_cast<const uint16_t *>(data) + batch * batch_stride + head * head_stride + position * position_stride;
    }

    // What a code of each part of a vector of INT8 stands for.
    const uint16_t *scales_of(int64_t batch, int64_t head, int64_t position) const {
        return scales + batch * scale_batch + head * scale_head + position * scale_position;
    }

    // Prefetch the key or value at `position`. Inlined first of all, for GCC leaves out calls of a function that returns
    // nothing and changes nothing.
    __attribute__((always_inline)) void prefetch(int64_t batch, int64_t head, int64_t position) const {
        const int64_t item = format == FLOAT32 ? 4 : format == INT8 ? 1 : 2;
        const char *at = static_cast<const char *>(data) +
                         (batch * batch_stride + head * head_stride + position * position_stride) * item;
        for (int64_t byte = 0; byte < dim * item; byte += 64) __builtin_prefetch(at + byte);
        if (format == INT8) __builtin_prefetch(scales_of(batch, head, position));
    }
};

constexpr int64_t VECTORS_AHEAD = 8; // vectors that are prefetched where positions are gathered

inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

// Run task(i) for i in [0, count) on up to `threads` threads; a free thread takes the next task. Where one has no memory,
// those that were not begun are left out, and the caller is told: an exception that leaves a thread ends the process.
template <typename Task> void in_parallel(int64_t count, int64_t threads, Task task) {
    if (threads <= 1 || count <= 1) {
        for (int64_t i = 0; i < count; i++) task(i);
        return;
    }
    std::atomic<bool> failed{false};
    const auto attempt = [&](int64_t i) {
        if (failed) return;
        try {
            task(i);
        } catch (...) {
            failed = true;
        }
    };
#if defined(__SANITIZE_THREAD__)
    // ThreadSanitizer does not see how OpenMP's threads wait for each other.
    std::atomic<int64_t> next{0};
    const auto take = [&] {
        for (int64_t i; (i = next++) < count;) attempt(i);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < std::min(threads, count); i++) others.emplace_back(take);
    take();
    for (std::thread &other : others) other.join();
#else
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < count; i++) attempt(i);
#endif
    if (failed) throw std::bad_alloc();
}

// Memory that a thread keeps from call to call, one buffer for each `purpose`.
template <typename T, int purpose> T *scratch(size_t count) {
    static thread_local std::vector<T> room;
#if defined(__SANITIZE_ADDRESS__)
    room = std::vector<T>(count); // AddressSanitizer sees no overrun of a buffer that is longer than asked for
#else
    if (room.size() < count) room.resize(count);
#endif
    return room.data();
}

} // namespace HFS
