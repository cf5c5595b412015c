// Bit packing with 64-bit integers only: three shift-and-mask rounds bring eight codes together or apart.
#include <stdint.h>

namespace {

constexpr uint64_t spread(uint64_t low, int every) {
    uint64_t mask = 0;
    for (int at = 0; at < 64; at += every) mask |= low << at;
    return mask;
}

struct Squeeze {
    template <int bits>
    static inline uint64_t pack8(uint64_t x) {
        constexpr int gap = 8 - bits;
        constexpr uint64_t one = (1u << bits) - 1, two = (1u << 2 * bits) - 1, four = (uint64_t{1} << 4 * bits) - 1;
        x &= spread(one, 8);
        x = (x | x >> gap) & spread(two, 16);
        x = (x | x >> 2 * gap) & spread(four, 32);
        return (x | x >> 4 * gap) & (four | four << 4 * bits);
    }

    template <int bits>
    static inline uint64_t unpack8(uint64_t x) {
        constexpr int gap = 8 - bits;
        constexpr uint64_t one = (1u << bits) - 1, two = (1u << 2 * bits) - 1, four = (uint64_t{1} << 4 * bits) - 1;
        x = (x | x << 4 * gap) & spread(four, 32);
        x = (x | x << 2 * gap) & spread(two, 16);
        return (x | x << gap) & spread(one, 8);
    }

    // Four rows at a time: a quarter of the cache lines of the output are touched in one pass over the input.
    static void transpose(const uint32_t* from, int64_t from_pitch, int64_t rows, int64_t columns, uint32_t* to,
                          int64_t to_pitch, bool /*to_memory*/) {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4) {
            const uint32_t* in = from + r * from_pitch;
            for (int64_t c = 0; c < columns; ++c) {
                uint32_t* out = to + c * to_pitch + r;
                for (int i = 0; i < 4; ++i) out[i] = in[i * from_pitch + c];
            }
        }
        for (; r < rows; ++r) {
            for (int64_t c = 0; c < columns; ++c) to[c * to_pitch + r] = from[r * from_pitch + c];
        }
    }
};

}  // namespace

#include "bitpack.h"

namespace cloq {

const BitpackKernels* bitpack_scalar(int bits) {
    switch (bits) {
        case 2: return &Stream<2>::kernels;
        case 3: return &Stream<3>::kernels;
        case 4: return &Stream<4>::kernels;
        default: return &Stream<8>::kernels;
    }
}

}  // namespace cloq
