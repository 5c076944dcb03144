// Products of AMX's tiles: C [16 rows, 16 lanes] float32 += A [16 rows, 16 pairs] x B [16 pairs, 16 lanes], pairs of bfloat16. The instructions are
// written out here: the compiler's own (gcc 12) do not say that they read memory, so that what was stored before them may come too late or never.
// Included once by amx_tiles.cpp inside its namespace.
#pragma once

constexpr int STEP = 16;  // pairs that one product sums up

template <int T>
inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

template <int T>
inline void load_tile(const void* from, int64_t row_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(T) : "memory");
}

template <int T>
inline void store_tile(void* to, int64_t row_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(T) : "memory");
}

template <int C, int A, int B>
inline void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// The eight tiles of this thread, 16 rows of 64 bytes each, for as long as this lives: torch's own code configures them for itself. Some hundred cycles,
// against twenty thousand that 96 rows and 64 queries take.
class Tiles {
  public:
    Tiles() { asm volatile("ldtilecfg %0" ::"m"(SHAPES)); }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    struct alignas(64) Shapes {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    static constexpr Shapes SHAPES = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
};

template <int Count, typename Body>
inline void unrolled(Body body) {
    [&]<int... I>(std::integer_sequence<int, I...>) { (body(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, Count>{});
}

// Tiles of A in the order of products: 16 rows that lie `row_bytes` apart; the next product's begins `step_bytes` behind.
struct TileOperand {
    const uint8_t* at;
    int64_t row_bytes, step_bytes;
};

// Tiles are 4 of C at most, then A and B. With 2 x 2 of C a product of 16 cycles needs one load of 8, and the sums of each wait for three others, 48 of the
// 52 cycles that they take; 3 x 1 where there are but 16 lanes. `before(step)` runs in front of each step.
template <int Rows, int Vectors, typename Before>
inline void multiply(const TileOperand* a, const uint32_t* b, int b_stride, int steps, bool more, float* c, int c_stride, const Before& before) {
    static_assert(Rows * Vectors <= 4 && Rows + Vectors <= 4);
    unrolled<Rows>([&](auto r) {
        unrolled<Vectors>([&](auto v) {
            if (more) load_tile<r * Vectors + v>(c + r * LANES * c_stride + v * LANES, c_stride * 4);
            else zero_tile<r * Vectors + v>();
        });
    });
    for (int step = 0; step < steps; step++, b += STEP * b_stride) {
        before(step);
        unrolled<Vectors>([&](auto v) { load_tile<8 - Vectors + v>(b + v * LANES, b_stride * 4); });
        unrolled<Rows>([&](auto r) {
            load_tile<4 + r>(a[r].at + step * a[r].step_bytes, a[r].row_bytes);
            unrolled<Vectors>([&](auto v) { multiply_tiles<r * Vectors + v, 4 + r, 8 - Vectors + v>(); });
        });
    }
    unrolled<Rows>([&](auto r) {
        unrolled<Vectors>([&](auto v) { store_tile<r * Vectors + v>(c + r * LANES * c_stride + v * LANES, c_stride * 4); });
    });
}

// Tiles of A whose products are taken together, and of B.
constexpr int tiles_together(int vectors) { return vectors == 1 ? 3 : 2; }
constexpr int MOST_TOGETHER = 3;

// c [16 * rows, 16 * vectors] (+)= a x b, for at most `tiles_together` tiles of A. `before(vector, step)` as above.
template <typename Before>
inline void multiply_rows_of_tiles(const TileOperand* a, int rows, const uint32_t* b, int b_stride, int vectors, int steps, bool more, float* c, int c_stride, const Before& before) {
    for (int vector = 0; vector < vectors; vector += 2, b += 2 * LANES, c += 2 * LANES) {
        const auto ask = [&](int step) { before(vector, step); };
        if (vectors - vector == 1) {
            if (rows == 3) multiply<3, 1>(a, b, b_stride, steps, more, c, c_stride, ask);
            else if (rows == 2) multiply<2, 1>(a, b, b_stride, steps, more, c, c_stride, ask);
            else multiply<1, 1>(a, b, b_stride, steps, more, c, c_stride, ask);
        } else if (rows == 2) {
            multiply<2, 2>(a, b, b_stride, steps, more, c, c_stride, ask);
        } else {
            multiply<1, 2>(a, b, b_stride, steps, more, c, c_stride, ask);
        }
    }
}
