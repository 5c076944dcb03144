// Which instruction sets this processor has.
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace kvshare {

#if defined(__x86_64__)
static bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
}

// Whether there are AMX's tiles and this process may use them, which Linux wants to be asked, once for all threads. KVSHARE_EMULATED=amx takes it for granted:
// an emulator answers for instructions that the processor does not know.
static bool may_use_tiles() {
    const char* emulated = std::getenv("KVSHARE_EMULATED");
    if (emulated && !strcmp(emulated, "amx")) return true;
#if defined(__linux__)
    constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM and XFEATURE_XTILEDATA, of which older headers do not know
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILE) && (d & BF16) && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
#endif

static bool usable(const Isa& isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (&isa == &isa_amx) {
        static const bool has = has_avx512() && may_use_tiles();
        return has;
    }
    if (&isa == &isa_avx512) return has_avx512();
    if (&isa == &isa_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return true;
}

#if defined(__x86_64__)
static const Isa* const ISAS[] = {&isa_amx, &isa_avx512, &isa_avx2, &isa_plain};
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
