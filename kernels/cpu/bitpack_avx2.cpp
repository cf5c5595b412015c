// Bit packing with the bit gather and scatter instructions of BMI2: eight codes in one instruction.
#include <immintrin.h>
#include <stdint.h>

namespace {

struct Squeeze {
    template <int bits>
    static constexpr uint64_t mask = 0x0101010101010101u * ((1u << bits) - 1);

    template <int bits>
    static inline uint64_t pack8(uint64_t x) {
        return _pext_u64(x, mask<bits>);
    }

    template <int bits>
    static inline uint64_t unpack8(uint64_t x) {
        return _pdep_u64(x, mask<bits>);
    }

    static inline __m256i load(const uint32_t* words) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
    }

    static inline void store(uint32_t* words, __m256i value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), value);
    }

    static inline void stream(uint32_t* words, __m256i value) {
        _mm256_stream_si256(reinterpret_cast<__m256i*>(words), value);
    }

    static inline void transpose8(const uint32_t* from, int64_t from_pitch, uint32_t* to, int64_t to_pitch) {
        __m256i pairs[8], quads[8];
        for (int i = 0; i < 8; i += 2) {
            const __m256i a = load(from + i * from_pitch), b = load(from + (i + 1) * from_pitch);
            pairs[i] = _mm256_unpacklo_epi32(a, b);
            pairs[i + 1] = _mm256_unpackhi_epi32(a, b);
        }
        for (int i = 0; i < 8; i += 4) {
            quads[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
            quads[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
            quads[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
            quads[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
        }
        for (int i = 0; i < 4; ++i) {
            const __m256i low = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x20);
            const __m256i high = _mm256_permute2x128_si256(quads[i], quads[i + 4], 0x31);
            store(to + i * to_pitch, low);
            store(to + (i + 4) * to_pitch, high);
        }
    }

    // Sixteen rows at a time, so that each line of the output is written whole and at once, past the cache: lines that
    // are filled half by half cost several times as much, and fetching lines that are overwritten doubles the traffic.
    static void transpose_lines(const uint32_t* from, int64_t from_pitch, int64_t rows, int64_t columns, uint32_t* to,
                                int64_t to_pitch) {
        for (int64_t c = 0; c < columns; c += 8) {
            for (int64_t r = 0; r < rows; r += 16) {
                alignas(64) uint32_t lines[8 * 16];
                transpose8(from + r * from_pitch + c, from_pitch, lines, 16);
                transpose8(from + (r + 8) * from_pitch + c, from_pitch, lines + 8, 16);
                for (int i = 0; i < 8; ++i) {
                    uint32_t* out = to + (c + i) * to_pitch + r;
                    stream(out, load(lines + 16 * i));
                    stream(out + 8, load(lines + 16 * i + 8));
                }
            }
        }
        _mm_sfence();
    }

    static void transpose_blocks(const uint32_t* from, int64_t from_pitch, int64_t rows, int64_t columns, uint32_t* to,
                                 int64_t to_pitch) {
        for (int64_t r = 0; r < rows; r += 8) {
            for (int64_t c = 0; c < columns; c += 8) {
                // The rows of the input are far apart, each the beginning of a stream to the hardware.
                if (r + 8 < rows) {
                    const uint32_t* next = from + (r + 8 + c / 8 % 8) * from_pitch;
                    for (int64_t line = 0; line < columns; line += 16) __builtin_prefetch(next + line);
                }
                transpose8(from + r * from_pitch + c, from_pitch, to + c * to_pitch + r, to_pitch);
            }
        }
    }

    static void transpose(const uint32_t* from, int64_t from_pitch, int64_t rows, int64_t columns, uint32_t* to,
                          int64_t to_pitch, bool to_memory) {
        const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
        if (to_memory && rows % 16 == 0 && to_pitch % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
            transpose_lines(from, from_pitch, whole_rows, whole_columns, to, to_pitch);
        } else {
            transpose_blocks(from, from_pitch, whole_rows, whole_columns, to, to_pitch);
        }
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
                to[c * to_pitch + r] = from[r * from_pitch + c];
            }
        }
    }
};

}  // namespace

#include "bitpack.h"

namespace cloq {

const BitpackKernels* bitpack_avx2(int bits) {
    switch (bits) {
        case 2: return &Stream<2>::kernels;
        case 3: return &Stream<3>::kernels;
        case 4: return &Stream<4>::kernels;
        default: return &Stream<8>::kernels;
    }
}

}  // namespace cloq
