// Which instruction sets this processor has.
#include <cstring>

#include "kernels.h"

namespace kvshare {

static bool usable(const Isa& isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (&isa == &isa_avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") &&
               __builtin_cpu_supports("avx512bf16");
    if (&isa == &isa_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return true;
}

#if defined(__x86_64__)
static const Isa* const ISAS[] = {&isa_avx512, &isa_avx2, &isa_plain};
#else
static const Isa* const ISAS[] = {&isa_plain};
#endif

const Isa* isa_named(const char* name) {
    for (const Isa* isa : ISAS)
        if (!strcmp(isa->name, name)) return usable(*isa) ? isa : nullptr;
    return nullptr;
}

const Isa* best_isa() {
    for (const Isa* isa : ISAS)
        if (usable(*isa)) return isa;
    return &isa_plain;
}

static const Isa* active = best_isa();

const Isa& active_isa() { return *active; }

bool use_isa(const char* name) {
    const Isa* isa = isa_named(name);
    if (isa) active = isa;
    return isa != nullptr;
}

}  // namespace kvshare
