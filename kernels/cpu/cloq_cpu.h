// The C interface of the native CPU library: plain pointers and sizes, no torch, no Python.
//
// Callers (kernels/cpu/library.py) have checked every shape and dtype and pass contiguous tensors; nothing here reads
// or writes outside of the ranges that the comments give. Functions that return int return 0 for success.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define CLOQ_EXPORT extern "C" __declspec(dllexport)
#else
#define CLOQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Changed with every change of this interface, and compared by library.py: an old build beside new Python is refused.
#define CLOQ_ABI_VERSION 5

CLOQ_EXPORT int cloq_abi_version(void);

// The instruction-set levels that this build has code for, and those of them that this machine runs, separated by
// commas in rising order. The strings live as long as the library.
CLOQ_EXPORT const char* cloq_built_isas(void);
CLOQ_EXPORT const char* cloq_runnable_isas(void);

// The level in use: the highest runnable one, until cloq_select_isa is called.
CLOQ_EXPORT const char* cloq_isa(void);
// Use a level and what lies below it; "" means the highest. Returns 1 for an unknown name, 2 for one that cannot run.
CLOQ_EXPORT int cloq_select_isa(const char* name);

// Who runs the threads: "OpenMP runtime of the process" or "own threads".
CLOQ_EXPORT const char* cloq_threading(void);

// Bit streams. Code i of a row occupies bits i*bits .. i*bits+bits-1 of the row, bit 0 being the lowest of word 0; a
// row takes ceil(columns * bits / 32) words and the rest of its last word is zero. bits is 2, 3, 4 or 8.
//
// codes: (rows, columns). words: (rows, ceil(columns * bits / 32)), written whole.
// Returns 1 if a code does not fit its bits (words are then written, but meaningless).
CLOQ_EXPORT int cloq_pack_rows(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint32_t* words,
                               int threads);
// codes: (rows, columns), written whole; columns * bits <= words_per_row * 32.
CLOQ_EXPORT void cloq_unpack_rows(const uint32_t* words, int64_t rows, int64_t words_per_row, int64_t columns,
                                  int bits, uint8_t* codes, int threads);
// The same with the words of one row running down a column: words is (columns * bits / 32, rows). columns * bits is a
// multiple of 32.
CLOQ_EXPORT int cloq_pack_columns(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint32_t* words,
                                  int threads);
CLOQ_EXPORT void cloq_unpack_columns(const uint32_t* words, int64_t rows, int64_t columns, int bits, uint8_t* codes,
                                     int threads);

// Packed linear layers, y = x Q^T (+ bias), Q = scales * (codes - zeros), in the kernels' own layout.
//
// Sixteen output channels are a block, one to a 32-bit lane; the last block is padded with codes of 0, scales of 0 and
// zeros of 0. Input channels of a group are padded with codes of 0 to whole units of 32. A unit of a block is `bits`
// vectors of 16 words. The four bytes of a word hold 8 / bits codes each (two codes at 3 bits): slot j of a byte is
// its bits j*bits .. j*bits+bits-1. Bytes 0 and 1 hold even channels, bytes 2 and 3 odd ones, so that a 16-bit shift
// brings up a pair of neighbours: with n slots in a byte, channel 2*(v*2*n + b%2*n + j) + b/2 of the unit stands in
// slot j of byte b of word v. At 3 bits this takes four words, of which three are stored: their top two bits of every
// byte are, in order, bits 0-1, 2-3 and 4-5 of the bytes of the fourth.
//
// words: (blocks, groups * units per group * bits, 16); scales: (blocks, groups, 16) float16; zeros: the same, uint8.
struct cloq_weight {
    const uint32_t* words;
    const uint16_t* scales;
    const uint8_t* zeros;
    int64_t out_features;
    int64_t in_features;
    int64_t groups;  // divides in_features
    int64_t bits;    // 2, 3, 4 or 8
};

// Low-rank terms: y of a token with adapter i gains scaling[i] * B_i (A_i x); a token with a negative index gains none.
// Where several layers are computed as one, each is a slice: a range of blocks whose term has an A and a rank of its own.
struct cloq_lora {
    const void* a;         // (adapters, slices, rank, in_features)
    const void* b;         // (adapters, blocks, rank, 16): B, its rows in blocks, the last one padded with zeros
    const float* scaling;  // (adapters)
    const int32_t* ranks;  // (adapters, slices), 0 to rank: how many rows of A count; what follows them is not looked at
    const int32_t* ends;   // (slices), rising: the block after each slice; the last is the number of blocks
    const int32_t* index;  // (tokens); null means adapter 0 for every token
    int64_t adapters;
    int64_t slices;
    int64_t rank;
    int64_t dtype;  // of a and b
};

enum cloq_dtype { CLOQ_FLOAT32 = 0, CLOQ_BFLOAT16 = 1, CLOQ_FLOAT16 = 2 };

// Words and back. codes: (out_features, in_features). `words` in the struct is not looked at by the first.
CLOQ_EXPORT void cloq_pack_weight(const struct cloq_weight* weight, const uint8_t* codes, uint32_t* words, int threads);
CLOQ_EXPORT void cloq_unpack_weight(const struct cloq_weight* weight, uint8_t* codes, int threads);
// Rows first_row .. first_row + rows - 1 of Q, (rows, in_features) of any cloq_dtype: computed in float32, rounded once.
// first_row is a multiple of 16.
CLOQ_EXPORT void cloq_dequantize(const struct cloq_weight* weight, int64_t first_row, int64_t rows, int dtype, void* q,
                                 int threads);

// x: (tokens, in_features), y: (tokens, out_features), both of `dtype`. bias: (out_features) float32, or null.
// lora: or null. int8_activations: 0 computes with x as it is, 1 rounds every token of x to 8 bits first.
// deterministic: 1 gives a token the same bits whatever the others are, and how many; 0 takes the fastest way for so many.
// Returns 1, having done nothing, if an index names no adapter.
CLOQ_EXPORT int cloq_linear(const struct cloq_weight* weight, const void* x, int64_t tokens, int dtype, const float* bias,
                            const struct cloq_lora* lora, int int8_activations, int deterministic, void* y,
                            int threads);

// x_grad = grad * Q. grad: (tokens, out_features), x_grad: (tokens, in_features), both of `dtype`.
CLOQ_EXPORT void cloq_linear_input_grad(const struct cloq_weight* weight, const void* grad, int64_t tokens, int dtype,
                                        void* x_grad, int threads);

// y = x W^T (+ bias) with float W, every output in one order of addition whatever the number of tokens.
// weight: (out_features, in_features) of any cloq_dtype; x: (tokens, in_features); bias: (out_features), or null;
// y: (tokens, out_features).
CLOQ_EXPORT void cloq_dense_linear(const void* weight, int weight_dtype, int64_t out_features, int64_t in_features,
                                   const float* x, int64_t tokens, const float* bias, float* y, int threads);
