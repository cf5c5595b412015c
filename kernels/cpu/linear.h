// What the linear kernels of all instruction sets share: the layer in the layout of cloq_cpu.h, and their table.
#pragma once

#include <stdint.h>

#include <type_traits>

struct cloq_lora;

namespace cloq {

constexpr int kLanes = 16;  // output channels of a block
constexpr int kUnit = 32;   // input channels of a unit
constexpr int kMaxTokens = 12;
// Tokens that are smaller all over count as zero among 8-bit activations: the inverse of their step would overflow.
constexpr float kSmallest = 1e-30f;

constexpr int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }
constexpr int64_t smaller(int64_t left, int64_t right) { return left < right ? left : right; }

// Codes in a byte, and words of a unit before those of 3 bits are squeezed.
constexpr int slots(int bits) { return bits == 3 ? 2 : 8 / bits; }
constexpr int virtual_words(int bits) { return kUnit / (4 * slots(bits)); }
// The code that tables and sign extensions turn into 0, so that sums stay small.
constexpr int middle(int bits) { return 1 << (bits - 1); }

struct Layer {
    const uint32_t* words;
    const uint16_t* scales;
    const uint8_t* zeros;
    int64_t out_features, in_features, groups, bits;

    int64_t blocks() const { return ceil_div(out_features, kLanes); }
    int64_t group_size() const { return in_features / groups; }
    int64_t units_per_group() const { return ceil_div(group_size(), kUnit); }
    int64_t units() const { return groups * units_per_group(); }
    int64_t padded_in() const { return units() * kUnit; }
    const uint32_t* block_words(int64_t block) const { return words + block * units() * bits * kLanes; }
    const uint16_t* block_scales(int64_t block) const { return scales + block * groups * kLanes; }
    const uint8_t* block_zeros(int64_t block) const { return zeros + block * groups * kLanes; }
};

// Blocks of output channels, kMostBlocks at most, for `width` tokens (a width that the table lists).
//
// x: input channels in their order, padded as the layer's, `width` tokens side by side: float (channels, width), or
// four int8 (channels / 4, width) in the order of the words' bytes.
// sums: (groups, width), what x adds up to in each group. y: (width, kBlockPitch), its first blocks * 16 overwritten.
using BlockKernel = void (*)(const Layer& layer, int64_t block, int64_t blocks, const void* x, const float* sums, float* y);
constexpr int kMostBlocks = 4;
constexpr int kBlockPitch = kMostBlocks * kLanes;

template <class Kernel>
struct KernelsByWidth {
    const int* widths;  // rising, ends with 0
    const Kernel* kernels;  // index of `widths` -> the kernel of that many tokens

    bool exist() const { return kernels != nullptr; }
};
using BlockKernels = KernelsByWidth<BlockKernel>;

template <class Kernel, class... Widths>
struct TableOf {
    static constexpr int kWidths[] = {Widths::kWidth..., 0};
    static constexpr Kernel kKernels[] = {Widths::run...};
    static constexpr KernelsByWidth<Kernel> kernels = {kWidths, kKernels};
};
template <class Kernel>
struct NoKernels {
    static constexpr KernelsByWidth<Kernel> kernels = {};
};
template <class... Blocks>
using KernelTable = TableOf<BlockKernel, Blocks...>;

// Calls each(count, first) for `blocks` in groups of `most`, then half as many, and so on: count() is a constant.
template <int most, class Each>
inline void in_groups(int64_t blocks, Each each, int64_t first = 0) {
    for (; first + most <= blocks; first += most) each(std::integral_constant<int, most>(), first);
    if constexpr (most > 1) in_groups<most / 2>(blocks, each, first);
}

// Many rows by a panel of blocks that is decoded once for all of them. The rows, the panel and the sums of a call stay
// in the second-level cache: that is what the sizes below are about.
constexpr int kPassRows = 1024;  // tokens of a pass; a call gets some or all of them

// Low-rank terms whose rows of tiles each belong to one adapter.
struct TileLora {
    const cloq_lora* lora;
    int64_t rank_units;       // a unit is 32 ranks
    const uint16_t* z;        // (row tiles, slices, rank units, 16, 32) bfloat16
    const int32_t* adapters;  // (row tiles), negative where there is nothing to add
};

// Tiles of bfloat16; see linear_amx.cpp.
struct TileWork {
    const Layer* layer;
    int64_t block, blocks;  // at most kTileBlocks
    const uint16_t* x;      // (row tiles, units, 16, 32) bfloat16
    int64_t row_tiles;      // at most kTileRows / 16
    float* y;               // (row tiles * 16, kTileBlocks * 16), overwritten
    uint16_t* panel;        // kTilePanel entries
    const TileLora* lora;   // or null
};
constexpr int kTileBlocks = 16;
constexpr int kTileRows = 512;
constexpr int kTileUnits = 16;
constexpr int kTile = 16 * 32;  // entries of a tile
constexpr int kTilePanel = kTileBlocks * kTileUnits * kTile;

// The same in float32.
struct PanelWork {
    const Layer* layer;
    int64_t block, blocks;  // at most kPanelBlocks
    const float* x;         // for every kPanelUnits units, fewer at the end: (chunks, channels, panel_width)
    int64_t chunks;
    float* y;      // (chunks * panel_width, kPanelBlocks * 16), overwritten
    float* panel;  // kPanel entries
};
constexpr int kPanelBlocks = 8;
constexpr int kPanelUnits = 8;
constexpr int kPanel = kPanelBlocks * kPanelUnits * kLanes * kUnit;

// Several chunks of tokens by blocks whose codes are decoded once for all of them, every token in the order of
// `one_order`.
struct OrderedWork {
    const Layer* layer;
    int64_t block, blocks;  // at most kOrderedBlocks
    const float* x;         // (chunks, channels, width)
    const float* sums;      // (chunks, groups, width), what x adds up to in each group
    int64_t chunks;         // at most kOrderedChunks
    float* y;               // (chunks * width, kOrderedBlocks * 16), overwritten
    float* scratch;         // kOrderedScratch entries
};
using OrderedKernel = void (*)(const OrderedWork& work);
constexpr int kOrderedBlocks = 32;
constexpr int kOrderedChunks = 8;
// Half of a first-level cache, and sums that wait for the rest of their group.
constexpr int kOrderedPanel = 4096;
constexpr int kOrderedSums = kOrderedBlocks * kLanes * kLanes;
constexpr int kOrderedScratch = kOrderedPanel + kOrderedSums;

// grad * Q for some units of input channels, transposed. Panels hold Q transposed: input channels by output channels.
struct GradWork {
    const Layer* layer;
    int64_t unit, units;  // at most kGradUnits
    // Tiles: (token tiles, pairs of blocks, 16 pairs of output channels, 16 tokens, 2) bfloat16.
    // Panels: (token tiles, blocks, 16 output channels, 16 tokens) float.
    const void* grad;
    int64_t token_tiles;  // at most kTileRows / 16
    float* y;             // (units * 32, token tiles * 16), overwritten
    void* panel;          // kGradPanel floats, or twice as many bfloat16
};
constexpr int kGradUnits = 8;
constexpr int kGradBlocks = 16;  // of a panel in float32; twice as many in bfloat16
constexpr int kGradPanel = kGradUnits * kUnit * kGradBlocks * kLanes;

struct LinearKernels {
    BlockKernels float32;  // the fastest of each width
    // A token's bits depend neither on the width nor on `by_table` nor on `ordered`.
    BlockKernels one_order;
    KernelsByWidth<OrderedKernel> ordered;
    int64_t ordered_from;  // tokens from which it is the faster way
    BlockKernels int8;  // sums are whole numbers, so that any order is one; empty where there are none for these bits
    // One token and 2 bits: two neighbouring codes of a byte look up what both channels add. `tables` makes the sixteen
    // tables (of sixteen) of a unit's 32 activations; the kernel takes them as x. Null elsewhere.
    void (*tables)(const float* x, float* to);
    BlockKernel by_table;
    // Q of one unit of a block, (32, 16).
    void (*decode)(const Layer& layer, int64_t block, int64_t unit, float* q);
    void (*panels)(const PanelWork& work);
    int64_t panel_width, panels_from;  // tokens from which panels are the faster way
    void (*grad_panels)(const GradWork& work);
    // Null without tiles.
    void (*tiles)(const TileWork& work);
    int64_t tiles_from;
    void (*grad_tiles)(const GradWork& work);
    // 16 rows of A, fewer at its end, as (units, 16 pairs of channels, 16 ranks, 2) bfloat16.
    void (*pack_ranks)(const Layer& layer, const void* a, int dtype, int64_t rows, uint16_t* to);
    // z = x A^T of one row of tiles, every token times its factor, as in TileLora. ranks: (rank tiles, units, tile).
    void (*shrink)(const uint16_t* x, int64_t units, const uint16_t* ranks, int64_t rank_tiles, const float* factors,
                   uint16_t* z);
};

// Conversions and dot products whose speed matters for one token. dtype is a cloq_dtype.
struct RowKernels {
    void (*to_float)(const void* from, int dtype, int64_t count, float* to);
    void (*from_float)(const float* from, int dtype, int64_t count, void* to);
    // Round to 255 steps between -max and max; returns the step. Values become whole numbers.
    float (*round_to_steps)(float* row, int64_t count);
    // to[r * to_pitch + i] = sum_k a[r * length + k] * x[i * pitch + k] for r < rows and i < count
    void (*dots)(const void* a, int dtype, int64_t rows, int64_t length, const float* x, int64_t pitch, int64_t count,
                 float* to, int64_t to_pitch);
    // y[i * y_pitch + n] += sum_r z[r * pitch + i] * b[r * 16 + n] for i < count and n < 16. The sum is whole before it
    // meets y: where y is thousands of times as large, as a model's few huge activations are, each of its terms would
    // be rounded to the last place of y.
    void (*add_low_rank)(const void* b, int dtype, int64_t rank, const float* z, int64_t pitch, int64_t count, float* y,
                         int64_t y_pitch);
};

// Defined where the instruction set was built; dispatch.cpp knows.
const LinearKernels* linear_scalar(int bits);
const RowKernels* rows_scalar();
const LinearKernels* linear_avx2(int bits);
const RowKernels* rows_avx2();
const LinearKernels* linear_avx512(int bits);
const RowKernels* rows_avx512();
const LinearKernels* linear_amx(int bits);
const LinearKernels* linear_neon(int bits);
const RowKernels* rows_neon();

// In dispatch.cpp: the tables of the instruction set in use.
const LinearKernels* linear_kernels(int bits);
const RowKernels* row_kernels();

}  // namespace cloq
