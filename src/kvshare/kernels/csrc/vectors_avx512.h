// What the AVX512 kernels share. Included once by the AVX512 files inside their namespace.
#pragma once

// The sums of sixteen registers, or what else `join` makes of two numbers at a time, in order.
template <typename Join>
[[gnu::always_inline]] inline __m512 folded(const __m512* v, Join join) {
    __m512 four[4];
    for (int i = 0; i < 4; i++) {
        __m512 two[2];
        for (int j = 0; j < 2; j++) {
            const __m512 a = v[4 * i + 2 * j], b = v[4 * i + 2 * j + 1];
            two[j] = join(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        }
        const __m512d a = _mm512_castps_pd(two[0]), b = _mm512_castps_pd(two[1]);
        four[i] = join(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    __m512 half[2];
    for (int i = 0; i < 2; i++) {
        const __m512 a = four[2 * i], b = four[2 * i + 1];
        half[i] = join(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return join(_mm512_shuffle_f32x4(half[0], half[1], 0x88), _mm512_shuffle_f32x4(half[0], half[1], 0xdd));
}

inline __m512 sums_of(const __m512* v) {
    return folded(v, [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_add_ps(a, b); });
}

inline __m512 largest_of(const __m512* v) {
    return folded(v, [](__m512 a, __m512 b) __attribute__((always_inline)) { return _mm512_max_ps(a, b); });
}

// f(0), f(1), ... f(Count - 1), each with its index as a constant: arrays that are only indexed so stay in registers, which loops do not promise.
template <int Count, typename F>
[[gnu::always_inline]] inline void each(F&& f) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) { (f(std::integral_constant<int, I>()), ...); }(std::make_integer_sequence<int, Count>());
}

struct [[gnu::may_alias, gnu::packed]] Four {
    int32_t bytes;
};

// sum += dot products of four bytes, unsigned ones by signed ones. As assembly because gcc 12 copies the sums around its own intrinsic, and does not
// read the second factor from memory.
[[gnu::always_inline]] inline void add_products(__m512i& sum, __m512i by_unsigned, __m512i by_signed) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(by_unsigned), "v"(by_signed));
}
[[gnu::always_inline]] inline void add_products(__m512i& sum, __m512i by_unsigned, const void* by_signed) {  // the same four everywhere
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(by_unsigned), "m"(*static_cast<const Four*>(by_signed)));
}

// The same for two bfloat16.
[[gnu::always_inline]] inline void add_pairs(__m512& sum, __m512bh pairs, const void* by) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(*static_cast<const Four*>(by)));
}
[[gnu::always_inline]] inline void add_pairs(__m512& sum, __m512bh pairs, __m512bh by) { asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(by)); }
