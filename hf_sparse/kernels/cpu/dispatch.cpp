// What the library exports: the kernels of the best target, or set of instructions, that the CPU at hand can run. This
// file is compiled for every CPU of an architecture, the others once for each target. `TARGETS` lists those that are
// linked, the narrowest first: TARGET(generic) TARGET(avx2).

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace {

#if defined(__x86_64__)

// What CPUID says; zeros where the CPU knows no such leaf.
struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;

    Leaf(unsigned leaf, unsigned part) { __get_cpuid_count(leaf, part, &a, &b, &c, &d); }
};

bool all_of(unsigned word, unsigned mask) { return (word & mask) == mask; }

// Whether the operating system saves the registers that bits of XCR0 stand for.
bool saved(unsigned mask) {
    if (!(Leaf(1, 0).c & bit_OSXSAVE)) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return all_of(low, mask);
}

constexpr unsigned SSE_AND_AVX = 0x6, AVX512_TOO = 0xe6;
constexpr unsigned AVX512 = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;

bool is_avx2() { return saved(SSE_AND_AVX) && Leaf(1, 0).c & bit_FMA && Leaf(7, 0).b & bit_AVX2; }

bool is_avxvnni() { return is_avx2() && Leaf(7, 0).a >= 1 && Leaf(7, 1).a >> 4 & 1; }

bool is_avx512() { return is_avx2() && saved(AVX512_TOO) && all_of(Leaf(7, 0).b, AVX512); }

bool is_avx512vnni() { return is_avx512() && Leaf(7, 0).c & bit_AVX512VNNI; }

// The matrix unit. Linux saves its registers for a process that asked for it.
bool is_amx() {
#if defined(__linux__)
    constexpr unsigned TILE_STATE = 0x60000, BF16_TILE_INT8 = 1u << 22 | 1u << 24 | 1u << 25, AVX512_BF16 = 1u << 5;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return is_avx512vnni() && saved(TILE_STATE) && all_of(Leaf(7, 0).d, BF16_TILE_INT8) && Leaf(7, 0).a >= 1 &&
           Leaf(7, 1).a & AVX512_BF16 && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

#elif defined(__aarch64__)

#if defined(__linux__)
bool is_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; } // HWCAP_ASIMDDP

bool is_i8mm() { return is_dotprod() && getauxval(AT_HWCAP2) >> 13 & 1; } // HWCAP2_I8MM
#elif defined(__APPLE__)
bool has(const char *feature) {
    int32_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname(feature, &value, &size, nullptr, 0) == 0 && value;
}

bool is_dotprod() { return has("hw.optional.arm.FEAT_DotProd"); }

bool is_i8mm() { return is_dotprod() && has("hw.optional.arm.FEAT_I8MM"); }
#else
bool is_dotprod() { return false; }

bool is_i8mm() { return false; }
#endif

#endif

bool supports(const char *target) {
#if defined(__x86_64__)
    if (!std::strcmp(target, "avx2")) return is_avx2();
    if (!std::strcmp(target, "avxvnni")) return is_avxvnni();
    if (!std::strcmp(target, "avx512")) return is_avx512();
    if (!std::strcmp(target, "avx512vnni")) return is_avx512vnni();
    if (!std::strcmp(target, "amx")) return is_amx();
#elif defined(__aarch64__)
    if (!std::strcmp(target, "dotprod")) return is_dotprod();
    if (!std::strcmp(target, "i8mm")) return is_i8mm();
#endif
    return !std::strcmp(target, "generic");
}

} // namespace

extern "C" {

#define TARGET(name)                                                                                                   \
    int64_t hfs_##name##_lanes();                                                                                      \
    void hfs_##name##_quantise(const void *, const void *, const float *, int64_t, int64_t, int64_t, int64_t,          \
                              int64_t);                                                                                \
    void hfs_##name##_select(const void *);                                                                            \
    void hfs_##name##_attend(const void *);                                                                            \
    void hfs_##name##_decode(const void *);
TARGETS
#undef TARGET

} // extern "C"

namespace {

struct Target {
    const char *name;
    int64_t (*lanes)();
    void (*quantise)(const void *, const void *, const float *, int64_t, int64_t, int64_t, int64_t, int64_t);
    void (*select)(const void *);
    void (*attend)(const void *);
    void (*decode)(const void *);
};

#define TARGET(name)                                                                                                   \
    {#name, hfs_##name##_lanes, hfs_##name##_quantise, hfs_##name##_select, hfs_##name##_attend, hfs_##name##_decode},
constexpr Target LINKED[] = {TARGETS{}};
#undef TARGET

// The target of that name, or the last of any name, that this CPU can run; nullptr for none.
const Target *find(const char *name) {
    const Target *found = nullptr;
    for (const Target *target = LINKED; target->name; target++)
        if ((!name || !std::strcmp(target->name, name)) && supports(target->name)) found = target;
    return found;
}

const Target *used = find(nullptr);

template <typename Run> int32_t failed(Run run) {
    try {
        run();
        return 0;
    } catch (...) {
        return 1;
    }
}

} // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Whether this CPU can run a target, linked or not.
EXPORTED int32_t hfs_supports(const char *target) { return supports(target); }

// Use a target from now on; false, and nothing changes, if it is not linked or this CPU cannot run it.
EXPORTED int32_t hfs_use(const char *target) {
    if (const Target *found = find(target)) return used = found, true;
    return false;
}

// The target in use, at first the best; nullptr if none is linked.
EXPORTED const char *hfs_target() { return used ? used->name : nullptr; }

EXPORTED int64_t hfs_lanes() { return used->lanes(); }

// The kernels give 0, or 1 where there is no memory: C knows no exceptions.

EXPORTED int32_t hfs_quantise(const void *key, const void *out, const float *center, int64_t batches, int64_t heads,
                              int64_t start, int64_t stop, int64_t threads) {
    return failed([&] { used->quantise(key, out, center, batches, heads, start, stop, threads); });
}

EXPORTED int32_t hfs_select(const void *call) {
    return failed([&] { used->select(call); });
}

EXPORTED int32_t hfs_attend(const void *call) {
    return failed([&] { used->attend(call); });
}

EXPORTED int32_t hfs_decode(const void *call) {
    return failed([&] { used->decode(call); });
}
