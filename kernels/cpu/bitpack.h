// Bit packing of rows and of transposed tiles, written once over the two ways to squeeze eight codes together.
//
// Included by one translation unit per instruction set, which defines a struct Squeeze with
//   template <int bits> static uint64_t pack8(uint64_t codes);    // 8 bytes -> the low 8*bits bits
//   template <int bits> static uint64_t unpack8(uint64_t stream); // the low 8*bits bits -> 8 bytes
//   static void transpose(const uint32_t* from, int64_t from_pitch, int64_t rows, int64_t columns, uint32_t* to,
//                         int64_t to_pitch, bool to_memory);       // to[c * to_pitch + r] = from[r * from_pitch + c]
// where to_memory says that the output is large and not read again soon.
// Everything has internal linkage: no function compiled for one instruction set can be linked into another.
#pragma once

#include <stdint.h>
#include <string.h>

#include "kernels.h"

namespace {

template <int bits>
struct Stream {
    // 32 codes fill exactly `bits` words.
    static inline uint64_t pack32(const uint8_t* codes, uint32_t* words) {
        uint64_t c[4];
        memcpy(c, codes, 32);
        const uint64_t all = c[0] | c[1] | c[2] | c[3];
        if constexpr (bits == 8) {
            memcpy(words, codes, 32);
        } else {
            uint64_t s[4];
            for (int i = 0; i < 4; ++i) s[i] = Squeeze::template pack8<bits>(c[i]);
            if constexpr (bits == 2) {
                const uint64_t w = s[0] | s[1] << 16 | s[2] << 32 | s[3] << 48;
                memcpy(words, &w, 8);
            } else if constexpr (bits == 3) {
                const uint64_t w = s[0] | s[1] << 24 | s[2] << 48;
                const uint32_t last = static_cast<uint32_t>(s[2] >> 16 | s[3] << 8);
                memcpy(words, &w, 8);
                memcpy(words + 2, &last, 4);
            } else {
                const uint64_t w[2] = {s[0] | s[1] << 32, s[2] | s[3] << 32};
                memcpy(words, w, 16);
            }
        }
        return all;
    }

    static inline void unpack32(const uint32_t* words, uint8_t* codes) {
        if constexpr (bits == 8) {
            memcpy(codes, words, 32);
        } else {
            // Eight codes are stored as soon as they are made: gathering them in an array first would make one wide load
            // wait for four narrow stores.
            const auto store = [&](int eighth, uint64_t stream) {
                const uint64_t c = Squeeze::template unpack8<bits>(stream & ((uint64_t{1} << 8 * bits) - 1));
                memcpy(codes + 8 * eighth, &c, 8);
            };
            if constexpr (bits == 2) {
                uint64_t w;
                memcpy(&w, words, 8);
                for (int i = 0; i < 4; ++i) store(i, w >> 16 * i);
            } else if constexpr (bits == 3) {
                uint64_t w;
                uint32_t last;
                memcpy(&w, words, 8);
                memcpy(&last, words + 2, 4);
                store(0, w);
                store(1, w >> 24);
                store(2, w >> 48 | static_cast<uint64_t>(last) << 16);
                store(3, last >> 8);
            } else {
                uint64_t w[2];
                memcpy(w, words, 16);
                for (int i = 0; i < 4; ++i) store(i, w[i / 2] >> 32 * (i % 2));
            }
        }
    }

    // One row of any length; returns the OR of all codes, eight to a word.
    static uint64_t pack_row(const uint8_t* codes, int64_t columns, uint32_t* words) {
        uint64_t all = 0;
        int64_t k = 0;
        for (; k + 32 <= columns; k += 32, words += bits) all |= pack32(codes + k, words);
        if (k < columns) {
            uint8_t last[32] = {0};
            uint32_t packed[bits];
            memcpy(last, codes + k, static_cast<size_t>(columns - k));
            all |= pack32(last, packed);
            memcpy(words, packed, static_cast<size_t>(((columns - k) * bits + 31) / 32 * 4));
        }
        return all;
    }

    static void unpack_row(const uint32_t* words, int64_t columns, uint8_t* codes) {
        int64_t k = 0;
        for (; k + 32 <= columns; k += 32, words += bits) unpack32(words, codes + k);
        if (k < columns) {
            uint32_t packed[bits] = {0};
            uint8_t last[32];
            memcpy(packed, words, static_cast<size_t>(((columns - k) * bits + 31) / 32 * 4));
            unpack32(packed, last);
            memcpy(codes + k, last, static_cast<size_t>(columns - k));
        }
    }

    static uint64_t pack_rows(const uint8_t* codes, int64_t rows, int64_t columns, int64_t words_per_row,
                              uint32_t* words) {
        uint64_t all = 0;
        for (int64_t row = 0; row < rows; ++row) all |= pack_row(codes + row * columns, columns, words + row * words_per_row);
        return all;
    }

    static void unpack_rows(const uint32_t* words, int64_t rows, int64_t words_per_row, int64_t columns,
                            uint8_t* codes) {
        for (int64_t row = 0; row < rows; ++row) unpack_row(words + row * words_per_row, columns, codes + row * columns);
    }

    // A tile of at most kBitpackTileRows rows by kBitpackTileColumns codes whose words run down columns `stride` words
    // apart. It is packed row by row into a buffer and copied out transposed, so that both sides are touched in runs
    // of several cache lines. The odd row length keeps the rows of the buffer out of each other's cache sets.
    static constexpr int64_t kRows = cloq::kBitpackTileRows;
    static constexpr int64_t kPitch = cloq::kBitpackTileColumns / 32 * bits + 1;

    static constexpr int64_t kAhead = 2;

    static uint64_t pack_tile(const uint8_t* codes, int64_t pitch, int64_t rows, int64_t columns, uint32_t* words,
                              int64_t stride) {
        uint32_t buffer[kRows * kPitch];
        uint64_t all = 0;
        for (int64_t row = 0; row < rows; ++row) {
            // The hardware sees a new stream begin with every row and fetches too late.
            if (row + kAhead < rows) {
                const uint8_t* next = codes + (row + kAhead) * pitch;
                for (int64_t k = 0; k < columns; k += 64) __builtin_prefetch(next + k);
            }
            all |= pack_row(codes + row * pitch, columns, buffer + row * kPitch);
        }
        Squeeze::transpose(buffer, kPitch, rows, columns * bits / 32, words, stride, true);
        return all;
    }

    static void unpack_tile(const uint32_t* words, int64_t stride, int64_t rows, int64_t columns, uint8_t* codes,
                            int64_t pitch) {
        uint32_t buffer[kRows * kPitch];
        Squeeze::transpose(words, stride, columns * bits / 32, rows, buffer, kPitch, false);
        for (int64_t row = 0; row < rows; ++row) unpack_row(buffer + row * kPitch, columns, codes + row * pitch);
    }

    static constexpr cloq::BitpackKernels kernels = {pack_rows, unpack_rows, pack_tile, unpack_tile};
};

}  // namespace
