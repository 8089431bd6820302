// Loaded before everything else: the kernels' requests for memory fail from the n-th on, once `arm` has been called.

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <new>

namespace {

std::atomic<int64_t> left{INT64_MAX};

bool asked_by_kernels(const void *caller) {
    Dl_info info;
    return dladdr(caller, &info) && info.dli_fname && std::strstr(info.dli_fname, "/kernels-");
}

} // namespace

extern "C" void arm(int64_t requests) { left = requests; }

void *operator new(std::size_t size) {
    if (left != INT64_MAX && asked_by_kernels(__builtin_return_address(0)) && left-- <= 0) throw std::bad_alloc();
    if (void *found = std::malloc(size ? size : 1)) return found;
    throw std::bad_alloc();
}

void operator delete(void *room) noexcept { std::free(room); }

void operator delete(void *room, std::size_t) noexcept { std::free(room); }
