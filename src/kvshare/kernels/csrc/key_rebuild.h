// Keys from the values beside them: K = RoPE(V * w). Included once by each file of a set inside that set's namespace.
#pragma once

// One head of bfloat16. `rotated` [2 * moving] is the part that the rotation moved, where it is stored; null: it is rotated here, rounded as
// the layer's own rotation rounds.
inline void rebuild_key(const KeyRebuild& rebuild, int width, int64_t position, const uint16_t* v, const uint16_t* rotated, uint16_t* k) {
    const int half = width / 2, moving = rebuild.moving;
#pragma omp simd
    for (int i = 0; i < width; i++) k[i] = float_to_bf16(bf16_to_float(v[i]) * bf16_to_float(rebuild.weight[i]));
    if (rotated) {
        memcpy(k, rotated, size_t(moving) * 2);
        memcpy(k + half, rotated + moving, size_t(moving) * 2);
        return;
    }
    const uint16_t *cos = rebuild.cos + position * moving, *sin = rebuild.sin + position * moving;
    const auto rounded = [](float x) { return bf16_to_float(float_to_bf16(x)); };
#pragma omp simd
    for (int i = 0; i < moving; i++) {
        const float a = bf16_to_float(k[i]), b = bf16_to_float(k[half + i]), c = bf16_to_float(cos[i]), s = bf16_to_float(sin[i]);
        k[i] = float_to_bf16(rounded(a * c) - rounded(b * s));
        k[half + i] = float_to_bf16(rounded(b * c) + rounded(a * s));
    }
}
