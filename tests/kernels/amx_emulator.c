/* AMX for processors without: SIGILL's handler decodes and carries out the instructions that kvshare's kernels use, as Intel's manual describes them (volume
   2, LDTILECFG ... TDPBF16PS), and ends the process where a processor would refuse. Made to find mistakes, not to be fast. */
#define _GNU_SOURCE
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define TILES 8
#define ROWS 16
#define ROW_BYTES 64

typedef struct {
    int configured, rows[TILES], row_bytes[TILES];
    uint8_t data[TILES][ROWS][ROW_BYTES];
} State;

static __thread State *mine __attribute__((tls_model("initial-exec"))); /* a pointer: libraries loaded late get little room of this kind */
static long executed, configured_threads;

long emulator_executed(void) { return __atomic_load_n(&executed, __ATOMIC_SEQ_CST); }
long emulator_configured_threads(void) { return __atomic_load_n(&configured_threads, __ATOMIC_SEQ_CST); }

static void refuse(const char *why, const uint8_t *at) {
    fprintf(stderr, "amx emulator: %s, at", why);
    for (int i = 0; i < 10; i++) fprintf(stderr, " %02x", at[i]);
    fprintf(stderr, "\n");
    _exit(99);
}

static void release(void) {
    if (mine->configured) __atomic_fetch_sub(&configured_threads, 1, __ATOMIC_SEQ_CST);
    memset(mine, 0, sizeof *mine);
}

static void configure(const uint8_t *c, const uint8_t *at) {
    release();
    if (c[0] == 0) return;
    if (c[0] != 1 || c[1] != 0) refuse("a palette other than 1, or tiles begun in the middle", at);
    for (int i = 2; i < 64; i++)
        if ((i < 16 || (i >= 32 && i < 48) || i >= 56) && c[i]) refuse("reserved bytes of a configuration are not zero", at);
    for (int t = 0; t < TILES; t++) {
        uint16_t bytes;
        memcpy(&bytes, c + 16 + 2 * t, 2);
        if (c[48 + t] > ROWS || bytes > ROW_BYTES || !c[48 + t] != !bytes) refuse("a tile of impossible shape", at);
        mine->rows[t] = c[48 + t];
        mine->row_bytes[t] = bytes;
    }
    mine->configured = 1;
    __atomic_fetch_add(&configured_threads, 1, __ATOMIC_SEQ_CST);
}

typedef uint32_t Words __attribute__((vector_size(ROW_BYTES), aligned(4), may_alias));
typedef float Floats __attribute__((vector_size(ROW_BYTES), aligned(4), may_alias));

/* C += A B. Even and odd numbers of the pairs are summed up apart, fused, from zero, and only then together and onto C. The caller has set rounding to nearest
   and denormals to zero. */
__attribute__((target("avx512f"), optimize("O3"))) static void multiply(int c, int a, int b, const uint8_t *at) {
    const int pairs = mine->row_bytes[a] / 4;
    if (c == a || c == b || a == b) refuse("TDPBF16PS of a tile with itself", at);
    if (!mine->rows[c] || !mine->rows[a] || !mine->rows[b]) refuse("TDPBF16PS of a tile that is not configured", at);
    if (mine->row_bytes[c] % 4 || mine->row_bytes[a] % 4 || mine->rows[c] != mine->rows[a] || pairs != mine->rows[b] || mine->row_bytes[c] != mine->row_bytes[b])
        refuse("TDPBF16PS of tiles whose shapes disagree", at);
    for (int m = 0; m < mine->rows[c]; m++) { /* what lies behind a row of B is zero, and stays zero in C */
        Floats even = {0}, odd = {0}, *row = (Floats *)mine->data[c][m];
        for (int k = 0; k < pairs; k++) {
            uint32_t bits;
            memcpy(&bits, mine->data[a][m] + 4 * k, 4);
            const Words x = bits - (Words){0}, y = *(const Words *)mine->data[b][k], upper = 0xffff0000 - (Words){0};
            even = (Floats)_mm512_fmadd_ps((__m512)(x << 16), (__m512)(y << 16), (__m512)even);
            odd = (Floats)_mm512_fmadd_ps((__m512)(x & upper), (__m512)(y & upper), (__m512)odd);
        }
        *row += even + odd;
    }
    for (int m = mine->rows[c]; m < ROWS; m++) memset(mine->data[c][m], 0, ROW_BYTES);
}

static int64_t number(const ucontext_t *context, int index) { /* of a register as instructions count them */
    static const int PLACES[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return context->uc_mcontext.gregs[PLACES[index]];
}

/* One instruction with a prefix of three bytes; null where it is none of AMX. Otherwise the next one. */
static const uint8_t *carry_out(const ucontext_t *context, const uint8_t *at) {
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84)) return NULL; /* VEX.128.0F38.W0 */
    const int r = !(at[1] & 0x80), x = !(at[1] & 0x40), b = !(at[1] & 0x20), vvvv = ~at[2] >> 3 & 15, prefix = at[2] & 3, op = at[3], mod = at[4] >> 6;
    const int reg = at[4] >> 3 & 7, rm = at[4] & 7;
    const uint8_t *next = at + 5;
    enum { NONE, P66, F3, F2 };
    if (op == 0x5c && prefix == F3 && mod == 3) {
        if (r || b || vvvv >= TILES) refuse("TDPBF16PS of a tile above 7", at);
        multiply(reg, rm, vvvv, at);
        return next;
    }
    if (op != 0x49 && op != 0x4b) return NULL;
    if (vvvv) refuse("VEX.vvvv is not 1111", at);
    if (op == 0x49 && mod == 3) {
        if (prefix == NONE && reg == 0 && rm == 0) return release(), next;
        if (prefix != F2 || rm) return NULL;
        if (r || !mine->rows[reg]) refuse("TILEZERO of a tile that is not configured", at);
        memset(mine->data[reg], 0, sizeof mine->data[reg]);
        return next;
    }
    if (mod == 3) return NULL;

    int64_t address = 0, stride = 0;
    if (rm == 4) {
        const int sib = *next++, base = (sib & 7) | b << 3, index = (sib >> 3 & 7) | x << 3;
        if (index != 4) stride = number(context, index) * (1 << (sib >> 6)); /* of tiles; part of the address for a configuration */
        if ((sib & 7) == 5 && mod == 0) {
            int32_t there;
            memcpy(&there, next, 4);
            address = there;
            next += 4;
        } else {
            address = number(context, base);
        }
    } else if (rm == 5 && mod == 0) { /* from the next instruction on */
        int32_t there;
        memcpy(&there, next, 4);
        next += 4;
        address = (int64_t)(intptr_t)next + there;
    } else {
        address = number(context, rm | b << 3);
    }
    if (mod == 1) address += (int8_t)*next++;
    if (mod == 2) {
        int32_t there;
        memcpy(&there, next, 4);
        address += there;
        next += 4;
    }
    if (op == 0x49) {
        if (prefix != NONE || reg) return NULL;
        configure((const uint8_t *)(intptr_t)(address + stride), at);
        return next;
    }
    if (rm != 4 || prefix == NONE) return NULL;
    if (r || !mine->rows[reg]) refuse("a tile that is not configured is loaded or stored", at);
    for (int m = 0; m < ROWS; m++) {
        uint8_t *row = mine->data[reg][m], *memory = (uint8_t *)(intptr_t)(address + m * stride);
        const size_t bytes = (size_t)mine->row_bytes[reg];
        if (prefix == F3) { /* TILESTORED */
            if (m < mine->rows[reg]) memcpy(memory, row, bytes);
            continue;
        }
        memset(row, 0, ROW_BYTES);
        if (m < mine->rows[reg]) memcpy(row, memory, bytes);
    }
    return next;
}

static void handle(int signal_number, siginfo_t *info, void *raw) {
    (void)signal_number, (void)info;
    ucontext_t *context = raw;
    const uint8_t *at = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    if (!mine) {
        mine = mmap(NULL, sizeof *mine, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mine == MAP_FAILED) refuse("no memory", at);
    }
    _mm_setcsr(0x9fc0); /* to nearest, denormals are zeros and become zeros, no exceptions; what was set comes back with the context */
    const uint8_t *next = carry_out(context, at);
    if (!next) refuse("an illegal instruction that is none of AMX", at);
    for (; next; next = carry_out(context, at)) { /* and those right behind: a signal takes longer than they do */
        at = next;
        __atomic_fetch_add(&executed, 1, __ATOMIC_SEQ_CST);
    }
    context->uc_mcontext.gregs[REG_RIP] = (greg_t)at;
}

int emulator_install(void) {
    struct sigaction action = {0};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    return sigaction(SIGILL, &action, NULL);
}

/* c [16, 16] += a [16, 32] b [16, 32] as the processor or the emulator does it, through every form of address: tiles 3, 7 and 5; `shapes` is the configuration. */
void multiply_with_instructions(const uint8_t *shapes, const uint16_t *a, const uint16_t *b, float *c) {
    __asm__ volatile(
        "ldtilecfg (%0)\n\t"
        "mov %1, %%r13\n\t"
        "mov $32, %%r9\n\t"
        "tileloadd (%%r13,%%r9,2), %%tmm7\n\t" /* base that must have a displacement, scaled index, both above rdi */
        "lea -1000(%2), %%r12\n\t"
        "mov $64, %%rcx\n\t"
        "tileloaddt1 1000(%%r12,%%rcx,1), %%tmm5\n\t" /* long displacement */
        "lea 64(%3), %%r8\n\t"
        "tileloadd -64(%%r8,%%rcx,1), %%tmm3\n\t" /* short one */
        "tdpbf16ps %%tmm5, %%tmm7, %%tmm3\n\t"
        "tilestored %%tmm3, -64(%%r8,%%rcx)\n\t"
        "tilezero %%tmm3\n\t"
        "tilerelease"
        :
        : "r"(shapes), "r"(a), "r"(b), "r"(c)
        : "memory", "rcx", "r8", "r9", "r12", "r13");
}
