// What dispatch.cpp chooses from: one table of functions per operation and instruction set.
#pragma once

#include <stdint.h>

namespace cloq {

constexpr int64_t kBitpackTileRows = 64;
constexpr int64_t kBitpackTileColumns = 1024;

// The bit stream of cloq_cpu.h at one width. pack_* return the OR of all codes, eight to a word, by which the caller
// finds a code that does not fit. A tile is a piece of a matrix: rows of codes `pitch` bytes apart, and words that run
// down columns `stride` words apart.
struct BitpackKernels {
    uint64_t (*pack_rows)(const uint8_t* codes, int64_t rows, int64_t columns, int64_t words_per_row, uint32_t* words);
    void (*unpack_rows)(const uint32_t* words, int64_t rows, int64_t words_per_row, int64_t columns, uint8_t* codes);
    uint64_t (*pack_tile)(const uint8_t* codes, int64_t pitch, int64_t rows, int64_t columns, uint32_t* words,
                          int64_t stride);
    void (*unpack_tile)(const uint32_t* words, int64_t stride, int64_t rows, int64_t columns, uint8_t* codes,
                        int64_t pitch);
};

// bits is 2, 3, 4 or 8.
const BitpackKernels* bitpack_scalar(int bits);
const BitpackKernels* bitpack_avx2(int bits);

}  // namespace cloq
