// Numbers as blocks: the searches that kvshare/checkpoints/block_encoding.py explains, and spells in torch.
// Included once by each file of a set inside that set's namespace.
#pragma once

// `value` as a 16-bit float in the file, and what that is.
inline float put_half(float value, uint8_t* to) {
    const uint16_t bits = float_to_half(value);
    memcpy(to, &bits, 2);
    return half_to_float(to);
}

inline float rounded_to_half(float value) {
    uint8_t bytes[2];
    return put_half(value, bytes);
}

inline float divided(float number, float by) { return by != 0 ? number / by : 0.0f; }
inline float at_least_zero(float number) { return number > 0 ? number : 0.0f; }

// x ~ scale * code - minimum.
struct Fit {
    float scale, minimum;
};

inline void codes_of(const float* x, Fit fit, float* q) {  // [32]
    const float inverse = divided(1.0f, fit.scale);
    for (int i = 0; i < 32; i++) {
        const float code = rintf((x[i] + fit.minimum) * inverse);
        q[i] = code < 0 ? 0.0f : code > 15 ? 15.0f : code;
    }
}

inline float squared_error(const float* x, const float* q, Fit fit) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < 32; i++) {
        const float off = q[i] * fit.scale - fit.minimum - x[i];
        sum += off * off;
    }
    return sum;
}

// The best fit for codes; where `least_zero`, with a minimum that is not negative.
inline Fit least_squares(const float* x, float mean, const float* q, bool least_zero) {
    float codes = 0, squares = 0, products = 0;
#pragma omp simd reduction(+ : codes, squares, products)
    for (int i = 0; i < 32; i++) {
        codes += q[i];
        squares += q[i] * q[i];
        products += q[i] * x[i];
    }
    const float centre = codes / 32, scale = at_least_zero(divided(products - codes * mean, squares - codes * centre));
    const float minimum = scale * centre - mean;
    if (least_zero && minimum < 0) return {at_least_zero(divided(products, squares)), 0.0f};
    return {scale, minimum};
}

inline Fit fit_group(const float* x, bool least_zero) {  // [32]
    constexpr float shrinks[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f};
    constexpr int refits = 2;
    float low = x[0], high = x[0], sum = 0, q[32];
    for (int i = 0; i < 32; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
        sum += x[i];
    }
    if (least_zero && low > 0) low = 0;
    const float middle = least_zero ? 0.0f : (low + high) / 2, mean = sum / 32;
    Fit best = {};
    float best_error = INFINITY;
    for (const float shrink : shrinks) {
        Fit fit = {(high - low) * (shrink / 15), -(middle + (low - middle) * shrink)};
        for (int i = 0; i < refits; i++) {
            codes_of(x, fit, q);
            fit = least_squares(x, mean, q, least_zero);
        }
        codes_of(x, fit, q);
        const float error = squared_error(x, q, fit);
        if (error < best_error) best = fit, best_error = error;
    }
    return best;
}

inline void put_nibbles(const float* low, const float* high, int count, uint8_t* to) {
    for (int i = 0; i < count; i++) to[i] = uint8_t(int(low[i]) | int(high[i]) << 4);
}

inline void encode_q8_0(const float* x, uint8_t* to) {
    float largest = 0;
    for (int i = 0; i < 32; i++) largest = fabsf(x[i]) > largest ? fabsf(x[i]) : largest;
    const float scale = put_half(largest / 127, to);
    for (int i = 0; i < 32; i++) {
        const float code = rintf(divided(x[i], scale));
        to[2 + i] = uint8_t(int8_t(code < -127 ? -127 : code > 127 ? 127 : code));
    }
}

inline void encode_q4_1(const float* x, uint8_t* to) {
    const Fit fit = fit_group(x, false);
    const Fit stored = {put_half(fit.scale, to), -put_half(-fit.minimum, to + 2)};
    float q[32];
    codes_of(x, stored, q);
    put_nibbles(q, q + 16, 16, to + 4);
}

// The 256 numbers of a block as codes under units and 6-bit steps; gives the squared error.
inline float codes_of_block(const float* x, Fit unit, const Fit* step, float* q) {
    float error = 0;
    for (int g = 0; g < 8; g++) {
        const Fit fit = {unit.scale * step[g].scale, unit.minimum * step[g].minimum};
        codes_of(x + 32 * g, fit, q + 32 * g);
        error += squared_error(x + 32 * g, q + 32 * g, fit);
    }
    return error;
}

// The units fitted to the codes of all groups.
inline Fit refitted_units(const float* x, Fit unit, const Fit* step, const float* q) {
    float a = 0, b = 0, c = 0, s = 0, t = 0;
    for (int g = 0; g < 8; g++) {
        float squares = 0, codes = 0, products = 0, sum = 0;
#pragma omp simd reduction(+ : squares, codes, products, sum)
        for (int i = 0; i < 32; i++) {
            squares += q[32 * g + i] * q[32 * g + i];
            codes += q[32 * g + i];
            products += q[32 * g + i] * x[32 * g + i];
            sum += x[32 * g + i];
        }
        a += step[g].scale * step[g].scale * squares;
        b -= step[g].scale * step[g].minimum * codes;
        c += step[g].minimum * step[g].minimum * 32;
        s += step[g].scale * products;
        t -= step[g].minimum * sum;
    }
    const float determinant = a * c - b * b;
    if (!(determinant > 1e-6f * a * c)) return unit;
    return {rounded_to_half(at_least_zero((s * c - t * b) / determinant)), rounded_to_half(at_least_zero((t * a - s * b) / determinant))};
}

inline void encode_q4_k(const float* x, uint8_t* to) {
    Fit fits[8], step[8], unit = {};
    for (int g = 0; g < 8; g++) {
        fits[g] = fit_group(x + 32 * g, true);
        unit.scale = fits[g].scale > unit.scale ? fits[g].scale : unit.scale;
        unit.minimum = fits[g].minimum > unit.minimum ? fits[g].minimum : unit.minimum;
    }
    unit = {rounded_to_half(unit.scale / 63), rounded_to_half(unit.minimum / 63)};
    for (int g = 0; g < 8; g++) {
        const float up = rintf(divided(fits[g].scale, unit.scale)), down = rintf(divided(fits[g].minimum, unit.minimum));
        step[g] = {up > 63 ? 63.0f : up, down > 63 ? 63.0f : down};
    }
    float q[256], again[256];
    const float error = codes_of_block(x, unit, step, q);
    const Fit other = refitted_units(x, unit, step, q);
    const bool better = codes_of_block(x, other, step, again) < error;
    if (better) unit = other;
    const float* codes = better ? again : q;
    put_half(unit.scale, to);
    put_half(unit.minimum, to + 2);
    for (int g = 0; g < 4; g++) {
        const int scale = int(step[g].scale), minimum = int(step[g].minimum), scale4 = int(step[g + 4].scale), minimum4 = int(step[g + 4].minimum);
        to[4 + g] = uint8_t(scale | scale4 >> 4 << 6);
        to[8 + g] = uint8_t(minimum | minimum4 >> 4 << 6);
        to[12 + g] = uint8_t((scale4 & 15) | (minimum4 & 15) << 4);
        put_nibbles(codes + 64 * g, codes + 64 * g + 32, 32, to + 16 + 32 * g);
    }
}

// One row of k numbers, bfloat16 or float32.
inline void encode_row(BlockType type, const void* numbers, bool bf16, int64_t k, uint8_t* to) {
    const BlockShape shape = shape_of(type);
    for (int64_t start = 0; start < k; start += shape.weights, to += shape.bytes) {
        float x[256];
        if (bf16)
            for (int64_t i = 0; i < shape.weights; i++) x[i] = bf16_to_float(static_cast<const uint16_t*>(numbers)[start + i]);
        else memcpy(x, static_cast<const float*>(numbers) + start, size_t(shape.weights) * 4);
        if (type == BlockType::Q8_0) encode_q8_0(x, to);
        else if (type == BlockType::Q4_1) encode_q4_1(x, to);
        else encode_q4_k(x, to);
    }
}
