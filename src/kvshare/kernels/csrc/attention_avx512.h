// Attention to rows of any kind for AVX512: scores, softmax and sum for up to eight heads of a group together.
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

// From raw scores to weights, in place, zeros behind `count`, with the running maximum, sum and output of one head brought along.
inline void weigh(float* scores, int count, const AttendState& state, int head) {
    __m512 s[2];
    __m512 largest = _mm512_set1_ps(-INFINITY);
    for (int i = 0; i < 2; i++) {
        s[i] = _mm512_mul_ps(_mm512_load_ps(scores + 16 * i), _mm512_set1_ps(state.scale));
        if (state.softcap > 0)
            s[i] = _mm512_mul_ps(hyperbolic_tangent(_mm512_mul_ps(s[i], _mm512_set1_ps(1.0f / state.softcap))), _mm512_set1_ps(state.softcap));
        const __mmask16 real = __mmask16(first_words(count) >> (16 * i));
        s[i] = _mm512_mask_blend_ps(real, _mm512_set1_ps(-INFINITY), s[i]);
        largest = _mm512_max_ps(largest, s[i]);
    }
    const float top = _mm512_reduce_max_ps(largest);
    if (top > state.maximum[head]) {
        const float shrink = expf(state.maximum[head] - top);
        state.maximum[head] = top;
        state.weight[head] *= shrink;
        float* out = state.out + int64_t(head) * state.value_width;
        for (int i = 0; i < state.value_width; i++) out[i] *= shrink;
    }
    for (int i = 0; i < 2; i++) {
        const __mmask16 real = __mmask16(first_words(count) >> (16 * i));
        s[i] = _mm512_maskz_mov_ps(real, exponential(_mm512_sub_ps(s[i], _mm512_set1_ps(state.maximum[head]))));
    }
    state.weight[head] += _mm512_reduce_add_ps(_mm512_add_ps(s[0], s[1]));
    for (int i = 0; i < 2; i++) _mm512_store_ps(scores + 16 * i, s[i]);
}

inline void attend_avx512(const AttendRows& rows, const AttendState& state) {
    if (state.keys == RowKind::FP32 || is_block(state.keys)) return attend_plain(rows, state);
    alignas(64) float scores[HEADS_TOGETHER * ATTEND_ROWS];
    const int group = state.group, key_width = state.key_width, value_width = state.value_width;
    const bool bf16_keys = state.keys == RowKind::BF16, bf16_values = state.values == RowKind::BF16;
    const int slices = (group + HEADS_TOGETHER - 1) / HEADS_TOGETHER;
    const int score_asks = bf16_keys ? bf16_asks(key_width, group) : slices * codes_asks(state.keys, key_width);
    const int sum_asks = bf16_values ? bf16_asks(value_width, group) : slices * codes_asks(state.values, value_width);
    Ahead ahead(rows, state.kv_heads * (score_asks + sum_asks));
    for (int kv_head = 0; kv_head < state.kv_heads; kv_head++) {
        const int64_t k_offset = kv_head * head_bytes(state.keys, key_width), v_offset = kv_head * head_bytes(state.values, value_width);
        for (int begin = 0; begin < group; begin += HEADS_TOGETHER) {
            const int head = kv_head * group + begin, heads = group - begin < HEADS_TOGETHER ? group - begin : HEADS_TOGETHER;
            const uint8_t* q = state.q + head * state.query_bytes;
            float* out = state.out + int64_t(head) * value_width;
            if (bf16_keys) score_bf16(heads, q, state.query_bytes, key_width, rows.k, k_offset, ahead, scores);
            else score_codes(state.keys, heads)(q, key_width, rows.k, k_offset, rows.count, ahead, scores);
            for (int h = 0; h < heads; h++) weigh(scores + h * ATTEND_ROWS, rows.count, state, head + h);
            if (bf16_values) sum_bf16(heads, scores, value_width, rows.v, v_offset, rows.count, ahead, out);
            else sum_codes(state.values, heads)(scores, value_width, rows.v, v_offset, rows.count, ahead, out);
        }
    }
    ahead.finish();
}
