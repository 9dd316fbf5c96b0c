// kernels/cuda/edit.cu on the processor; see cuda_emulation.h.

#include "cuda_emulation.h"

#include "edit.cu"

namespace {
Arguments arguments;
std::string wrong;
}  // namespace

// Runs the kernel; what went wrong, or an empty string.
extern "C" const char* launch(const char* name, unsigned grid, unsigned threads, unsigned shared, const void* packed,
                              unsigned seed) {
    memcpy(&arguments, packed, sizeof arguments);
    void (*kernel)() = nullptr;
#define NAMED(k) \
    if (!strcmp(name, #k)) kernel = [] { k(arguments); };
#define ALL(dtype) \
    NAMED(edit_##dtype) NAMED(edit_##dtype##_wide) NAMED(edit_and_norm_##dtype) NAMED(edit_and_norm_##dtype##_wide)
    ALL(float32) ALL(bfloat16) ALL(float16)
    wrong = kernel ? emulation::run(kernel, grid, threads, shared, seed) : "no such kernel";
    return wrong.c_str();
}
