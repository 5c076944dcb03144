// Reading memory and nothing else: what bandwidth is measured with. Included once by each file of a set inside its namespace.
#pragma once

#if defined(__AVX512F__)
typedef uint64_t ReadWords __attribute__((vector_size(64)));
#elif defined(__AVX2__)
typedef uint64_t ReadWords __attribute__((vector_size(32)));
#else
typedef uint64_t ReadWords __attribute__((vector_size(16)));
#endif

template <int STREAMS>
static uint64_t read_streams(const uint8_t* from, int64_t bytes, int64_t run, int64_t ahead) {
    constexpr int PARTS = 64 / sizeof(ReadWords);
    ReadWords sums[STREAMS > PARTS ? STREAMS : PARTS] = {};
    for (const uint8_t* block = from; block < from + bytes; block += STREAMS * run)
        for (int64_t at = 0; at < run; at += 64)
#pragma GCC unroll 16
            for (int s = 0; s < STREAMS; s++) {
                const uint8_t* line = block + s * run + at;
                if (ahead) __builtin_prefetch(line + ahead);
#pragma GCC unroll 4
                for (int part = 0; part < PARTS; part++) {
                    ReadWords words;
                    memcpy(&words, line + part * sizeof words, sizeof words);
                    sums[STREAMS > PARTS ? s : part] += words;
                }
            }
    uint64_t total = 0;
    for (const ReadWords& sum : sums)
        for (size_t i = 0; i < sizeof sum / 8; i++) total += sum[i];
    return total;
}

// The sum of words modulo 2^64. Blocks of `streams` runs of `run` bytes, multiples of 64, are read one after the other, the runs of a block side by
// side, as products read rows of a matrix; `ahead`: how far before its turn a line is asked for, 0 to leave that to the processor.
static uint64_t read_memory(const uint8_t* from, int64_t bytes, int streams, int64_t run, int64_t ahead) {
    if (streams == 16) return read_streams<16>(from, bytes, run, ahead);
    if (streams == 8) return read_streams<8>(from, bytes, run, ahead);
    if (streams == 4) return read_streams<4>(from, bytes, run, ahead);
    return read_streams<1>(from, bytes, run, ahead);
}
