// Attention to rows of any kind for AVX512: scores and sums for up to eight heads of a group together.
#pragma once

inline __m512 exponential(__m512 x) {  // within 2 ulp for x <= 0; zero below -87
    const __m512 t = _mm512_mul_ps(_mm512_max_ps(x, _mm512_set1_ps(-100.0f)), _mm512_set1_ps(1.44269504f));
    const __m512 whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), part = _mm512_sub_ps(t, whole);
    __m512 p = _mm512_set1_ps(1.5403530e-4f);  // 2^part by its series
    for (const float c : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f}) p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, whole);
}

inline __m512 hyperbolic_tangent(__m512 x) {  // of any x: (1 - e) / (1 + e), e = exp(-2 |x|)
    const __m512 e = exponential(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-2.0f))), one = _mm512_set1_ps(1.0f);
    const __m512 size = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    return _mm512_or_ps(size, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
}

inline __m512 power_of_two(__m512 x) {  // relative error below 4e-6, a hundredth of what rounding a weight to bfloat16 costs; 1 at 0
    const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0.01342668f);
    for (const float c : {0.05224247f, 0.2412802f, 0.69304484f, 1.0f}) p = _mm512_fmadd_ps(p, part, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, x);
}

constexpr int HEADS_WEIGHED = 32;  // between scores and sums

// From raw scores to weights, in place, zeros behind `count`, with the running maxima, sums and outputs of `heads` <= 16 heads from `head` on brought
// along.
inline void weigh(float* scores, int heads, int count, const AttendState& state, int head) {
    const __mmask32 real = first_words(count);
    const __mmask16 present = __mmask16((1 << heads) - 1);
    const __m512 nothing = _mm512_set1_ps(-INFINITY);
    __m512 of_heads[16];
    for (auto& each_head : of_heads) each_head = nothing;
    for (int h = 0; h < heads; h++)
        for (int i = 0; i < 2; i++) {
            float* at = scores + h * ATTEND_ROWS + 16 * i;
            __m512 s = _mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(state.scale));
            if (state.softcap > 0)
                s = _mm512_mul_ps(hyperbolic_tangent(_mm512_mul_ps(s, _mm512_set1_ps(1.0f / state.softcap))), _mm512_set1_ps(state.softcap));
            s = _mm512_mask_mov_ps(nothing, __mmask16(real >> (16 * i)), s);
            _mm512_store_ps(at, s);
            of_heads[h] = _mm512_max_ps(of_heads[h], s);
        }
    const __m512 tops = largest_of(of_heads), before = _mm512_maskz_loadu_ps(present, state.maximum + head);
    alignas(64) float maxima[16];
    _mm512_store_ps(maxima, _mm512_max_ps(tops, before));
    if (const __mmask16 grown = _mm512_mask_cmp_ps_mask(present, tops, before, _CMP_GT_OQ))
        for (int h = 0; h < heads; h++) {
            if (!(grown >> h & 1)) continue;
            const float shrink = expf(state.maximum[head + h] - maxima[h]);
            state.maximum[head + h] = maxima[h];
            state.weight[head + h] *= shrink;
            float* out = state.out + int64_t(head + h) * state.value_width;
            for (int i = 0; i < state.value_width; i++) out[i] *= shrink;
        }
    const __m512 log2_e = _mm512_set1_ps(1.44269504f);
    for (int h = 0; h < heads; h++) {
        const __m512 maximum = _mm512_set1_ps(maxima[h]);
        of_heads[h] = _mm512_setzero_ps();
        for (int i = 0; i < 2; i++) {
            float* at = scores + h * ATTEND_ROWS + 16 * i;
            const __m512 w = _mm512_maskz_mov_ps(__mmask16(real >> (16 * i)), power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(at), maximum), log2_e)));
            _mm512_store_ps(at, w);
            of_heads[h] = _mm512_add_ps(of_heads[h], w);
        }
    }
    float* weight = state.weight + head;
    _mm512_mask_storeu_ps(weight, present, _mm512_add_ps(_mm512_maskz_loadu_ps(present, weight), sums_of(of_heads)));
}

// Rows that are decoded one by one for all sets.
inline bool is_decoded_plainly(RowKind kind) { return kind == RowKind::FP32 || is_block(kind); }

// Scores of many heads, then their weights, then their sums: what one head waits for overlaps with the others' work.
inline void attend_avx512(const AttendRows& rows, const AttendState& state) {
    if (is_decoded_plainly(state.keys)) return attend_plain(rows, state);
    alignas(64) float scores[HEADS_WEIGHED * ATTEND_ROWS];
    const int group = state.group, key_width = state.key_width, value_width = state.value_width;
    const bool bf16_keys = state.keys == RowKind::BF16, bf16_values = state.values == RowKind::BF16;
    const int64_t k_bytes = head_bytes(state.keys, key_width), v_bytes = head_bytes(state.values, value_width);
    const int k_asks = bf16_keys ? bf16_asks(key_width, group) : score_asks(state.keys, key_width, group);
    const int v_asks = bf16_values ? bf16_asks(value_width, group) : sum_asks(state.values, value_width, group);
    Ahead ahead(rows, state.kv_heads * (k_asks + v_asks), !bf16_keys || !bf16_values);
    const int slices = (group + HEADS_TOGETHER - 1) / HEADS_TOGETHER, together = HEADS_WEIGHED / (group < HEADS_TOGETHER ? group : HEADS_TOGETHER);
    for (int first = 0, all = state.kv_heads * slices; first < all; first += together) {
        const int last = first + together < all ? first + together : all, first_head = first / slices * group + first % slices * HEADS_TOGETHER;
        const auto each_slice = [&](auto work) {  // work(heads, number of the first, their KV head, their weights)
            for (int slice = first; slice < last; slice++) {
                const int begin = slice % slices * HEADS_TOGETHER, heads = group - begin < HEADS_TOGETHER ? group - begin : HEADS_TOGETHER;
                const int head = slice / slices * group + begin;
                work(heads, head, slice / slices, scores + (head - first_head) * ATTEND_ROWS);
            }
        };
        int end = first_head;
        each_slice([&](int heads, int head, int kv_head, float* to) {
            const uint8_t* q = state.q + head * state.query_bytes;
            if (bf16_keys) score_bf16(heads, q, key_width, rows.k, kv_head * k_bytes, ahead, to);
            else score_codes(state.keys, heads)(q, key_width, rows.k, kv_head * k_bytes, ahead, to);
            end = head + heads;
        });
        for (int head = first_head; head < end; head += 16) weigh(scores + (head - first_head) * ATTEND_ROWS, end - head < 16 ? end - head : 16, rows.count, state, head);
        each_slice([&](int heads, int head, int kv_head, const float* weights) {
            float* out = state.out + int64_t(head) * value_width;
            if (bf16_values) sum_bf16(heads, weights, value_width, rows.v, kv_head * v_bytes, rows.count, ahead, out);
            else sum_codes(state.values, heads)(weights, value_width, rows.v, kv_head * v_bytes, rows.count, ahead, out);
        });
    }
    ahead.finish();
}

inline void settle_avx512(const AttendState& state) {
    if (!is_decoded_plainly(state.keys)) settle_codes(state.values, state.value_width, state.kv_heads * state.group, state.out);
}
