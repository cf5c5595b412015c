// The linear operations: activations are brought into the order that the kernels read, blocks of output channels are
// dealt to threads, and what a block gives is finished with bias and low-rank term. Every number is computed by one
// task in a fixed order, so the number of threads changes nothing.
#include "linear.h"

#include <stdlib.h>
#include <string.h>

#include "cloq_cpu.h"
#include "half.h"
#include "threads.h"

namespace cloq {
namespace {

// Memory that grows with need and stays for the next call: nothing is allocated once the sizes have been seen.
class Arena {
   public:
    ~Arena() { free(memory_); }

    // Forgets what was taken and makes room for `bytes` in `pieces` pieces.
    void reset(size_t bytes, size_t pieces) {
        bytes += 64 * pieces;
        if (bytes > size_) {
            free(memory_);
            memory_ = static_cast<char*>(aligned_alloc(64, (bytes + 63) / 64 * 64));
            if (memory_ == nullptr) abort();  // as operator new would end here: there is no way to report it
            size_ = bytes;
        }
        used_ = 0;
    }

    template <class T>
    T* take(int64_t count) {
        T* piece = reinterpret_cast<T*>(memory_ + used_);
        used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        return piece;
    }

   private:
    char* memory_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

thread_local Arena call_arena;
thread_local Arena task_arena;

enum Mode { kFloat32, kInt8, kTables, kOrdered, kPanels, kTiles };

// A row of tiles whose tokens have different adapters: its low-rank terms are computed token by token.
constexpr int32_t kMixed = -2;

struct Linear {
    Layer layer;
    const LinearKernels* kernels;
    const RowKernels* rows;
    const char* x;
    char* y;
    int64_t tokens;  // of this pass, at most kPassRows
    int dtype;
    int64_t element;
    const float* bias;
    const cloq_lora* lora;
    const int32_t* index;  // of this pass
    bool int8, deterministic;
    Mode mode;

    // One token wide or more; chunks of tokens are padded to one of the kernels' widths.
    int64_t width, chunks;
    BlockKernel kernel;
    OrderedKernel ordered;
    int64_t blocks_per_task;
    int64_t rows_per_call;  // of panels or tiles

    float* values;      // (tokens, in): only where low-rank terms are computed token by token
    char* activations;  // as BlockKernel, PanelWork or TileWork takes them
    uint16_t* plain;    // tiles of activations that were not rounded to 8 bits, for the low-rank term
    float* sums;        // (chunks, groups, width)
    float* steps;       // (tokens): what one step of an 8-bit activation is worth
    float* z;           // (slices, rank, tokens): scaling * A x

    // Low-rank terms by tiles, in that mode.
    int32_t tile_adapters[kPassRows / 16];  // (row tiles): the adapter of all tokens, negative for none, or kMixed
    int32_t slots[kPassRows / 16];          // (row tiles): which of `packed` it is
    int32_t packed[kPassRows / 16];         // the adapters of whole row tiles
    int64_t packed_count;
    uint16_t* ranks;    // (packed_count, slices, rank tiles, units, tile): their A
    uint16_t* tile_z;   // as in TileLora

    // A table of sixteen floats stands for two channels.
    int64_t channel_bytes() const { return mode == kInt8 ? 1 : mode == kTables ? 32 : 4; }
    int64_t chunk_bytes() const { return layer.padded_in() * width * channel_bytes(); }
    int64_t row_tiles() const { return ceil_div(tokens, 16); }
    int64_t rank_tiles() const { return ceil_div(lora->rank, kLanes); }

    // Of a token whose low-rank term is computed by itself.
    int adapter(int64_t token) const {
        if (lora == nullptr || (mode == kTiles && tile_adapters[token / 16] != kMixed)) return -1;
        return adapter_of(token);
    }
    int adapter_of(int64_t token) const { return index == nullptr ? 0 : index[token]; }
    int64_t rank_units() const { return ceil_div(lora->rank, kUnit); }
    int64_t rank_of(int64_t adapter, int64_t slice) const { return lora->ranks[adapter * lora->slices + slice]; }
    int64_t slice_of(int64_t block) const {
        int64_t slice = 0;
        while (block >= lora->ends[slice]) ++slice;
        return slice;
    }
};

// Where channel k (of a unit) stands among the unit's int8 activations: in the order of the words' bytes.
void int8_order(int64_t bits, uint8_t* order) {
    const int n = slots(static_cast<int>(bits));
    for (int v = 0; v < virtual_words(static_cast<int>(bits)); ++v) {
        for (int slot = 0; slot < n; ++slot) {
            for (int byte = 0; byte < 4; ++byte) {
                order[2 * (v * 2 * n + byte % 2 * n + slot) + byte / 2] = static_cast<uint8_t>((v * n + slot) * 4 + byte);
            }
        }
    }
}

// A token's row of tiles of 16 tokens by 32 channels.
void to_tiles(const Layer& layer, const uint16_t* from, int64_t token, uint16_t* tiles) {
    const int64_t size = layer.group_size(), padded = layer.units_per_group() * kUnit;
    uint16_t* to = tiles + token / 16 * layer.units() * kTile + token % 16 * kUnit;
    for (int64_t group = 0; group < layer.groups; ++group) {
        for (int64_t k = 0; k < padded; k += kUnit, to += kTile) {
            const int64_t count = smaller(kUnit, size - k);
            if (count == kUnit) {
                memcpy(to, from + group * size + k, kUnit * 2);
                continue;
            }
            memcpy(to, from + group * size + k, static_cast<size_t>(count) * 2);
            memset(to + count, 0, static_cast<size_t>(kUnit - count) * 2);
        }
    }
}

void prepare_token(void* context, int64_t token) {
    Linear& work = *static_cast<Linear*>(context);
    const Layer& layer = work.layer;
    const int64_t in = layer.in_features, size = layer.group_size(), padded = layer.units_per_group() * kUnit;
    const char* given = work.x + token * in * work.element;
    if (work.mode == kTiles && !work.int8) {
        if (work.values != nullptr) work.rows->to_float(given, work.dtype, in, work.values + token * in);
        to_tiles(layer, reinterpret_cast<const uint16_t*>(given), token, reinterpret_cast<uint16_t*>(work.activations));
        return;
    }
    task_arena.reset(2 * static_cast<size_t>(in) * sizeof(float), 2);
    float* row = work.values != nullptr ? work.values + token * in : task_arena.take<float>(in);
    work.rows->to_float(given, work.dtype, in, row);
    if (work.mode == kTiles) {
        // Whole numbers up to 127 are exact in bfloat16.
        float* rounded = task_arena.take<float>(in);
        uint16_t* half = reinterpret_cast<uint16_t*>(rounded);
        if (work.plain != nullptr) {
            work.rows->from_float(row, CLOQ_BFLOAT16, in, half);
            to_tiles(layer, half, token, work.plain);
        }
        memcpy(rounded, row, static_cast<size_t>(in) * sizeof(float));
        work.steps[token] = work.rows->round_to_steps(rounded, in);
        work.rows->from_float(rounded, CLOQ_BFLOAT16, in, half);
        to_tiles(layer, half, token, reinterpret_cast<uint16_t*>(work.activations));
        return;
    }
    const int64_t width = work.width, chunk = token / width, m = token % width;
    float* sums = work.sums == nullptr ? nullptr : work.sums + chunk * layer.groups * width + m;
    char* to = work.activations + chunk * work.chunk_bytes();
    float* source = row;
    if (work.int8) {
        if (work.values != nullptr) {  // the low-rank term takes the activations as they are
            source = task_arena.take<float>(in);
            memcpy(source, row, static_cast<size_t>(in) * sizeof(float));
        }
        work.steps[token] = work.rows->round_to_steps(source, in);
    }
    uint8_t order[kUnit];
    if (work.mode == kInt8) int8_order(layer.bits, order);
    for (int64_t group = 0; group < layer.groups; ++group) {
        const float* here = source + group * size;
        const int64_t base = group * padded;
        int64_t k = 0;
        if (work.mode == kPanels) {  // whose weights have their zeros taken off
            for (; k < padded; k += kUnit) {
                const int64_t unit = (base + k) / kUnit, first = unit / kPanelUnits * kPanelUnits;
                const int64_t units = smaller(kPanelUnits, layer.units() - first);
                const int64_t before = first * work.chunks + chunk * units + unit - first;
                float* at = reinterpret_cast<float*>(work.activations) + before * kUnit * width + m;
                const int64_t count = smaller(kUnit, size - k);
                for (int64_t i = 0; i < count; ++i) at[i * width] = here[k + i];
                for (int64_t i = count; i < kUnit; ++i) at[i * width] = 0.0f;
            }
            continue;
        }
        // Eight sums side by side: one alone would wait for itself, and its rounding errors would add up.
        float parts[8] = {0};
        for (; k + 8 <= size; k += 8) {
            for (int i = 0; i < 8; ++i) parts[i] += here[k + i];
        }
        for (; k < size; ++k) parts[k % 8] += here[k];
        sums[group * width] = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
        if (work.mode == kFloat32 || work.mode == kOrdered) {
            float* at = reinterpret_cast<float*>(to) + base * width + m;
            for (k = 0; k < size; ++k) at[k * width] = here[k];
            for (; k < padded; ++k) at[k * width] = 0.0f;
        } else if (work.mode == kTables) {
            float* at = reinterpret_cast<float*>(to) + base * 8;
            for (k = 0; k < padded; k += kUnit, at += kUnit * 8) {
                float unit[kUnit] = {0};
                memcpy(unit, here + k, static_cast<size_t>(smaller(kUnit, size - k)) * sizeof(float));
                work.kernels->tables(unit, at);
            }
        } else {
            int8_t* at = reinterpret_cast<int8_t*>(to) + base * width;
            for (k = 0; k < padded; ++k) {
                const int64_t place = k / kUnit * kUnit + order[k % kUnit];
                at[(place / 4 * width + m) * 4 + place % 4] = k < size ? static_cast<int8_t>(here[k]) : 0;
            }
        }
    }
}

// Calls each(adapter, first, count) for runs of tokens from first to last-1 that have one adapter.
template <class Each>
void adapter_runs(const Linear& work, int64_t first, int64_t last, Each each) {
    for (int64_t end; first < last; first = end) {
        const int adapter = work.adapter(first);
        for (end = first + 1; end < last && work.adapter(end) == adapter; ++end) {
        }
        if (adapter >= 0) each(adapter, first, end - first);
    }
}

// Find the adapter of every row of tiles, and those that need their A packed.
void find_tile_adapters(Linear& work) {
    work.packed_count = 0;
    for (int64_t tile = 0; tile < work.row_tiles(); ++tile) {
        int32_t adapter = work.adapter_of(tile * 16);
        const int64_t last = smaller(tile * 16 + 16, work.tokens);
        for (int64_t token = tile * 16 + 1; token < last; ++token) {
            if (work.adapter_of(token) != adapter) adapter = kMixed;
        }
        work.tile_adapters[tile] = adapter;
        work.slots[tile] = 0;
        if (adapter < 0) continue;
        int64_t slot = 0;
        while (slot < work.packed_count && work.packed[slot] != adapter) ++slot;
        if (slot == work.packed_count) work.packed[work.packed_count++] = adapter;
        work.slots[tile] = static_cast<int32_t>(slot);
    }
}

void pack_ranks_task(void* context, int64_t task) {
    const Linear& work = *static_cast<Linear*>(context);
    const cloq_lora& lora = *work.lora;
    const int64_t first = task % work.rank_tiles() * kLanes, in = work.layer.in_features;
    const int64_t slice = task / work.rank_tiles() % lora.slices;
    const int64_t adapter = work.packed[task / work.rank_tiles() / lora.slices], rank = work.rank_of(adapter, slice);
    if (first >= rank) return;
    const int64_t at = ((adapter * lora.slices + slice) * lora.rank + first) * in;
    work.kernels->pack_ranks(work.layer, static_cast<const char*>(lora.a) + at * (lora.dtype == CLOQ_FLOAT32 ? 4 : 2),
                             static_cast<int>(lora.dtype), smaller(kLanes, rank - first),
                             work.ranks + task * work.layer.units() * kTile);
}

void shrink_task(void* context, int64_t tile) {
    const Linear& work = *static_cast<Linear*>(context);
    if (work.tile_adapters[tile] < 0) return;
    const uint16_t* x = work.plain != nullptr ? work.plain : reinterpret_cast<const uint16_t*>(work.activations);
    float factors[16] = {0};
    for (int64_t i = 0; i < smaller(16, work.tokens - tile * 16); ++i) {
        // The sums that the term comes to are counted in steps.
        const float step = work.int8 ? work.steps[tile * 16 + i] : 1.0f;
        factors[i] = step == 0.0f ? 0.0f : work.lora->scaling[work.tile_adapters[tile]] / step;
    }
    const int64_t units = work.layer.units(), slices = work.lora->slices;
    for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t packed = (work.slots[tile] * slices + slice) * work.rank_tiles();
        work.kernels->shrink(x + tile * units * kTile, units, work.ranks + packed * units * kTile,
                             ceil_div(work.rank_of(work.tile_adapters[tile], slice), kLanes), factors,
                             work.tile_z + (tile * slices + slice) * work.rank_units() * kTile);
    }
}

constexpr int64_t kRankRows = 4;
constexpr int64_t kRankTokens = 32;

// z of some rows of A for some tokens. Tasks of the same tokens follow each other, so that these stay in the cache.
void low_rank_task(void* context, int64_t task) {
    Linear& work = *static_cast<Linear*>(context);
    const cloq_lora& lora = *work.lora;
    const int64_t in = work.layer.in_features, element = lora.dtype == CLOQ_FLOAT32 ? 4 : 2;
    const int64_t row_tasks = ceil_div(lora.rank, kRankRows);
    const int64_t r = task % row_tasks * kRankRows, slice = task / row_tasks % lora.slices;
    const int64_t first = task / row_tasks / lora.slices * kRankTokens, last = smaller(work.tokens, first + kRankTokens);
    adapter_runs(work, first, last, [&](int adapter, int64_t from, int64_t count) {
        const int64_t rows = smaller(kRankRows, work.rank_of(adapter, slice) - r);
        if (rows <= 0) return;
        const char* a = static_cast<const char*>(lora.a) + ((adapter * lora.slices + slice) * lora.rank + r) * in * element;
        float* to = work.z + (slice * lora.rank + r) * work.tokens + from;
        work.rows->dots(a, static_cast<int>(lora.dtype), rows, in, work.values + from * in, in, count, to, work.tokens);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < count; ++i) to[row * work.tokens + i] *= lora.scaling[adapter];
        }
    });
}

// Bring the sums of some blocks for tokens first .. first+count-1, `pitch` apart, to their end: steps of 8-bit
// activations, low-rank terms, bias; and store them.
void finish(const Linear& work, int64_t block, int64_t blocks, int64_t first, int64_t count, float* sums, int64_t pitch) {
    const int64_t out = work.layer.out_features, column = block * kLanes;
    const int64_t columns = smaller(blocks * kLanes, out - column);
    if (work.int8) {
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t n = 0; n < columns; ++n) sums[i * pitch + n] *= work.steps[first + i];
        }
    }
    if (work.lora != nullptr) {
        const cloq_lora& lora = *work.lora;
        const int64_t element = lora.dtype == CLOQ_FLOAT32 ? 4 : 2;
        adapter_runs(work, first, first + count, [&](int adapter, int64_t from, int64_t run) {
            for (int64_t b = 0; b < blocks; ++b) {
                const int64_t at = (adapter * work.layer.blocks() + block + b) * lora.rank * kLanes;
                const int64_t slice = work.slice_of(block + b);
                work.rows->add_low_rank(static_cast<const char*>(lora.b) + at * element, static_cast<int>(lora.dtype),
                                        work.rank_of(adapter, slice), work.z + slice * lora.rank * work.tokens + from,
                                        work.tokens, run, sums + (from - first) * pitch + b * kLanes, pitch);
            }
        });
    }
    for (int64_t i = 0; i < count; ++i) {
        float* token = sums + i * pitch;
        if (work.bias != nullptr) {
            for (int64_t n = 0; n < columns; ++n) token[n] += work.bias[column + n];
        }
        work.rows->from_float(token, work.dtype, columns, work.y + ((first + i) * out + column) * work.element);
    }
}

void multiply_blocks(void* context, int64_t task) {
    const Linear& work = *static_cast<Linear*>(context);
    const int64_t block = task * work.blocks_per_task;
    const int64_t blocks = smaller(work.blocks_per_task, work.layer.blocks() - block);
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
        alignas(64) float sums[kMaxTokens * kBlockPitch];
        work.kernel(work.layer, block, blocks, work.activations + chunk * work.chunk_bytes(),
                    work.sums + chunk * work.layer.groups * work.width, sums);
        const int64_t count = smaller(work.width, work.tokens - chunk * work.width);
        finish(work, block, blocks, chunk * work.width, count, sums, kBlockPitch);
    }
}

// A few tokens at a time share the loads of B, and their rows of the output are written while they are near.
constexpr int64_t kFinishedTogether = 8;

void finish_all(const Linear& work, int64_t block, int64_t blocks, int64_t first, int64_t count, float* sums,
                int64_t pitch) {
    for (int64_t i = 0; i < count; i += kFinishedTogether) {
        finish(work, block, blocks, first + i, smaller(kFinishedTogether, count - i), sums + i * pitch, pitch);
    }
}

void multiply_tiles(void* context, int64_t task) {
    const Linear& work = *static_cast<Linear*>(context);
    constexpr int64_t kPitch = kTileBlocks * kLanes;
    TileWork tiles;
    tiles.layer = &work.layer;
    tiles.block = task * work.blocks_per_task;
    tiles.blocks = smaller(work.blocks_per_task, work.layer.blocks() - tiles.block);
    const int64_t sums = work.rows_per_call * kPitch;
    task_arena.reset(static_cast<size_t>(sums) * 4 + static_cast<size_t>(kTilePanel) * 2, 2);
    tiles.y = task_arena.take<float>(sums);
    tiles.panel = task_arena.take<uint16_t>(kTilePanel);
    for (int64_t first = 0; first < work.tokens; first += work.rows_per_call) {
        const int64_t count = smaller(work.rows_per_call, work.tokens - first);
        tiles.x = reinterpret_cast<const uint16_t*>(work.activations) + first / 16 * work.layer.units() * kTile;
        tiles.row_tiles = ceil_div(count, 16);
        TileLora lora;
        tiles.lora = nullptr;
        if (work.packed_count > 0) {
            lora = {work.lora, work.rank_units(),
                    work.tile_z + first / 16 * work.lora->slices * work.rank_units() * kTile,
                    work.tile_adapters + first / 16};
            tiles.lora = &lora;
        }
        work.kernels->tiles(tiles);
        finish_all(work, tiles.block, tiles.blocks, first, count, tiles.y, kPitch);
    }
}

void multiply_panels(void* context, int64_t task) {
    const Linear& work = *static_cast<Linear*>(context);
    constexpr int64_t kPitch = kPanelBlocks * kLanes;
    PanelWork panels;
    panels.layer = &work.layer;
    panels.block = task * work.blocks_per_task;
    panels.blocks = smaller(work.blocks_per_task, work.layer.blocks() - panels.block);
    panels.x = reinterpret_cast<const float*>(work.activations);
    panels.chunks = work.chunks;
    const int64_t sums = work.chunks * work.width * kPitch;
    task_arena.reset(static_cast<size_t>(sums + kPanel) * 4, 2);
    panels.y = task_arena.take<float>(sums);
    panels.panel = task_arena.take<float>(kPanel);
    work.kernels->panels(panels);
    finish_all(work, panels.block, panels.blocks, 0, work.tokens, panels.y, kPitch);
}

void multiply_ordered(void* context, int64_t task) {
    const Linear& work = *static_cast<Linear*>(context);
    constexpr int64_t kPitch = kOrderedBlocks * kLanes;
    OrderedWork ordered;
    ordered.layer = &work.layer;
    ordered.block = task * work.blocks_per_task;
    ordered.blocks = smaller(work.blocks_per_task, work.layer.blocks() - ordered.block);
    const int64_t together = smaller(work.chunks, kOrderedChunks), sums = together * work.width * kPitch;
    task_arena.reset(static_cast<size_t>(sums + kOrderedScratch) * 4, 2);
    ordered.y = task_arena.take<float>(sums);
    ordered.scratch = task_arena.take<float>(kOrderedScratch);
    for (int64_t chunk = 0; chunk < work.chunks; chunk += together) {
        ordered.x = reinterpret_cast<const float*>(work.activations + chunk * work.chunk_bytes());
        ordered.sums = work.sums + chunk * work.layer.groups * work.width;
        ordered.chunks = smaller(together, work.chunks - chunk);
        work.ordered(ordered);
        const int64_t first = chunk * work.width, count = smaller(ordered.chunks * work.width, work.tokens - first);
        finish_all(work, ordered.block, ordered.blocks, first, count, ordered.y, kPitch);
    }
}

// The widest kernel, or for few tokens the narrowest that holds them; many tokens are spread evenly over chunks.
template <class Kernel>
Kernel choose_width(Linear& work, const KernelsByWidth<Kernel>& table) {
    const int* widths = table.widths;
    int widest = 0;
    while (widths[widest + 1] != 0) ++widest;
    const int64_t chunks = ceil_div(work.tokens, widths[widest]);
    const int64_t wanted = ceil_div(work.tokens, chunks);
    int pick = 0;
    while (widths[pick] < wanted) ++pick;
    work.width = widths[pick];
    work.chunks = ceil_div(work.tokens, work.width);
    return table.kernels[pick];
}

// Tiles and panels add up in orders of their own.
Mode choose_mode(const Linear& work) {
    const LinearKernels& kernels = *work.kernels;
    const bool rounds = work.int8 || work.dtype == CLOQ_BFLOAT16;
    if (!work.deterministic && kernels.tiles != nullptr && work.tokens >= kernels.tiles_from && rounds) return kTiles;
    if (work.int8 && kernels.int8.exist()) return kInt8;
    if (!work.deterministic && work.tokens >= kernels.panels_from) return kPanels;
    if (work.deterministic && kernels.ordered.exist() && work.tokens >= kernels.ordered_from) return kOrdered;
    return work.tokens == 1 && kernels.by_table != nullptr && !work.int8 ? kTables : kFloat32;
}

void run_pass(Linear& work, int threads) {
    const Layer& layer = work.layer;
    const LinearKernels& kernels = *work.kernels;
    const int64_t in = layer.in_features, row_tiles = work.row_tiles();
    work.mode = choose_mode(work);
    work.packed_count = 0;
    bool by_token = work.lora != nullptr;
    int64_t activation_bytes, sum_count = 0, tile_entries = 0;
    if (work.mode == kTiles) {
        tile_entries = row_tiles * layer.units() * kTile;
        activation_bytes = 2 * tile_entries;
        if (work.lora != nullptr) {
            find_tile_adapters(work);
            by_token = false;
            for (int64_t tile = 0; tile < row_tiles; ++tile) by_token = by_token || work.tile_adapters[tile] == kMixed;
        }
    } else {
        if (work.mode == kTables) {
            work.width = work.chunks = 1;
            work.kernel = kernels.by_table;
        } else if (work.mode == kOrdered) {
            work.ordered = choose_width(work, kernels.ordered);
        } else if (work.mode == kPanels) {
            work.width = kernels.panel_width;
            work.chunks = ceil_div(work.tokens, work.width);
        } else {
            work.kernel = choose_width(work, work.mode == kInt8   ? kernels.int8
                                             : work.deterministic ? kernels.one_order
                                                                  : kernels.float32);
        }
        activation_bytes = work.chunks * work.chunk_bytes();
        sum_count = work.mode == kPanels ? 0 : work.chunks * layer.groups * work.width;
    }
    const bool by_tile = work.packed_count > 0;
    const int64_t plain_count = by_tile && work.int8 ? tile_entries : 0;
    const int64_t slices = work.lora == nullptr ? 0 : work.lora->slices;
    const int64_t rank_count = by_tile ? work.packed_count * slices * work.rank_tiles() * layer.units() * kTile : 0;
    const int64_t tile_z_count = by_tile ? row_tiles * slices * work.rank_units() * kTile : 0;
    const int64_t value_count = by_token ? work.tokens * in : 0;
    const int64_t z_count = by_token ? slices * work.lora->rank * work.tokens : 0;
    call_arena.reset(static_cast<size_t>(activation_bytes) + 2 * static_cast<size_t>(plain_count + rank_count + tile_z_count) +
                         4 * static_cast<size_t>(value_count + sum_count + work.tokens + z_count), 8);
    work.activations = call_arena.take<char>(activation_bytes);
    work.plain = plain_count > 0 ? call_arena.take<uint16_t>(plain_count) : nullptr;
    work.ranks = call_arena.take<uint16_t>(rank_count);
    work.tile_z = call_arena.take<uint16_t>(tile_z_count);
    work.values = value_count > 0 ? call_arena.take<float>(value_count) : nullptr;
    work.sums = sum_count > 0 ? call_arena.take<float>(sum_count) : nullptr;
    work.steps = call_arena.take<float>(work.tokens);
    work.z = call_arena.take<float>(z_count);
    // Rows of the last chunk or tile that no token fills must be numbers.
    if (work.mode == kTiles && work.tokens % 16 != 0) {
        const int64_t last = (row_tiles - 1) * layer.units() * kTile;
        memset(work.activations + 2 * last, 0, static_cast<size_t>(tile_entries - last) * 2);
        if (work.plain != nullptr) memset(work.plain + last, 0, static_cast<size_t>(tile_entries - last) * 2);
    } else if (work.mode != kTiles && work.tokens < work.chunks * work.width) {
        memset(work.activations, 0, static_cast<size_t>(activation_bytes));
        if (sum_count > 0) memset(work.sums, 0, static_cast<size_t>(sum_count) * sizeof(float));
    }
    parallel_for(work.tokens, work.tokens * in < 65536 ? 1 : threads, prepare_token, &work);
    if (by_tile) {
        parallel_for(work.packed_count * slices * work.rank_tiles(), threads, pack_ranks_task, &work);
        parallel_for(row_tiles, threads, shrink_task, &work);
    }
    if (by_token) {
        const int64_t tasks = slices * ceil_div(work.lora->rank, kRankRows) * ceil_div(work.tokens, kRankTokens);
        const bool small = work.tokens * in * work.lora->rank < 65536;
        parallel_for(tasks, small ? 1 : threads, low_rank_task, &work);
    }
    const int64_t blocks = layer.blocks();
    if (work.mode == kTiles || work.mode == kPanels || work.mode == kOrdered) {
        // Wide panels reuse the activations, but every thread should have some.
        const int64_t most = work.mode == kTiles ? kTileBlocks : work.mode == kPanels ? kPanelBlocks : kOrderedBlocks;
        work.blocks_per_task = smaller(most, ceil_div(blocks, threads > 0 ? threads : 1));
        // Calls of equal size, in whole tiles.
        const int64_t calls = ceil_div(work.tokens, kTileRows);
        work.rows_per_call = ceil_div(row_tiles, calls) * 16;
        parallel_for(ceil_div(blocks, work.blocks_per_task), threads,
                     work.mode == kTiles    ? multiply_tiles
                     : work.mode == kPanels ? multiply_panels
                                            : multiply_ordered,
                     &work);
    } else {
        // As many as go together in a kernel, but enough tasks for cores of uneven speed.
        const int64_t share = blocks / (8 * (threads > 0 ? threads : 1));
        work.blocks_per_task = share < 1 ? 1 : smaller(kMostBlocks, share);
        parallel_for(ceil_div(blocks, work.blocks_per_task), threads, multiply_blocks, &work);
    }
}

Layer layer_of(const cloq_weight& weight) {
    return {weight.words, weight.scales, weight.zeros, weight.out_features, weight.in_features, weight.groups, weight.bits};
}

// grad * Q. Rows and columns change places: what the kernels give is (input channels, tokens), because that is how the
// lanes of the packed layout lie.
struct InputGrad {
    Layer layer;
    const LinearKernels* kernels;
    const RowKernels* rows;
    const char* grad;  // (tokens, out)
    char* x_grad;      // (tokens, in)
    int64_t tokens;    // of this pass, at most kTileRows
    int dtype;
    int64_t element;
    bool tiles;
    int64_t units_per_task;
    void* packed;  // as in GradWork

    int64_t token_tiles() const { return ceil_div(tokens, 16); }
};

void pack_grad(void* context, int64_t tile) {
    const InputGrad& work = *static_cast<InputGrad*>(context);
    const int64_t out = work.layer.out_features, blocks = work.layer.blocks(), pairs = ceil_div(blocks, 2);
    const int64_t size = work.tiles ? pairs * kTile : blocks * kLanes * kLanes;  // words of 32 bits: half as many in tiles
    uint32_t* to = static_cast<uint32_t*>(work.packed) + tile * (work.tiles ? size / 2 : size);
    const int64_t count = smaller(16, work.tokens - tile * 16), padded = work.tiles ? pairs * kUnit : blocks * kLanes;
    task_arena.reset(static_cast<size_t>(padded) * sizeof(float), 1);
    float* row = task_arena.take<float>(padded);
    uint32_t* words = reinterpret_cast<uint32_t*>(row);
    const int64_t word_count = work.tiles ? padded / 2 : padded;
    for (int64_t token = 0; token < 16; ++token) {
        memset(row, 0, static_cast<size_t>(padded) * sizeof(float));
        const char* from = work.grad + (tile * 16 + token) * out * work.element;
        if (token < count && work.tiles) memcpy(row, from, static_cast<size_t>(out) * 2);
        if (token < count && !work.tiles) work.rows->to_float(from, work.dtype, out, row);
        for (int64_t word = 0; word < word_count; ++word) to[word * 16 + token] = words[word];
    }
}

void multiply_grad(void* context, int64_t task) {
    const InputGrad& work = *static_cast<InputGrad*>(context);
    const Layer& layer = work.layer;
    GradWork part;
    part.layer = &layer;
    part.unit = task * work.units_per_task;
    part.units = smaller(work.units_per_task, layer.units() - part.unit);
    part.grad = work.packed;
    part.token_tiles = work.token_tiles();
    const int64_t pitch = part.token_tiles * 16, sums = part.units * kUnit * pitch;
    task_arena.reset(static_cast<size_t>(sums + kGradPanel) * sizeof(float), 2);
    part.y = task_arena.take<float>(sums);
    part.panel = task_arena.take<float>(kGradPanel);
    (work.tiles ? work.kernels->grad_tiles : work.kernels->grad_panels)(part);
    const int64_t size = layer.group_size(), per_group = layer.units_per_group();
    for (int64_t first = 0; first < work.tokens; first += 16) {
        const int64_t count = smaller(16, work.tokens - first);
        for (int64_t u = 0; u < part.units; ++u) {
            const int64_t unit = part.unit + u, k = unit % per_group * kUnit, channels = smaller(kUnit, size - k);
            float turned[16][kUnit];
            for (int64_t i = 0; i < kUnit; ++i) {
                const float* from = part.y + (u * kUnit + i) * pitch + first;
                for (int m = 0; m < 16; ++m) turned[m][i] = from[m];
            }
            for (int64_t m = 0; m < count; ++m) {
                const int64_t at = (first + m) * layer.in_features + unit / per_group * size + k;
                work.rows->from_float(turned[m], work.dtype, channels, work.x_grad + at * work.element);
            }
        }
    }
}

void run_grad_pass(InputGrad& work, int threads) {
    const Layer& layer = work.layer;
    work.tiles = work.kernels->grad_tiles != nullptr && work.dtype == CLOQ_BFLOAT16;
    const int64_t blocks = layer.blocks(), units = layer.units();
    const int64_t tile_bytes = work.tiles ? ceil_div(blocks, 2) * kTile * 2 : blocks * kLanes * kLanes * 4;
    call_arena.reset(static_cast<size_t>(work.token_tiles() * tile_bytes), 1);
    work.packed = call_arena.take<char>(work.token_tiles() * tile_bytes);
    parallel_for(work.token_tiles(), work.tokens * layer.out_features < 65536 ? 1 : threads, pack_grad, &work);
    work.units_per_task = smaller(kGradUnits, ceil_div(units, threads > 0 ? threads : 1));
    parallel_for(ceil_div(units, work.units_per_task), threads, multiply_grad, &work);
}

struct Packing {
    Layer layer;
    uint8_t* codes;
    uint32_t* words;
};

// Channel k of a unit -> word and shift of its code, words counted before those of 3 bits are squeezed.
void place_of(int bits, int k, int* word, int* shift) {
    const int n = slots(bits), pair = k / 2;
    *word = pair / (2 * n);
    *shift = 8 * (pair / n % 2 + 2 * (k % 2)) + bits * (pair % n);
}

void pack_block(void* context, int64_t block) {
    Packing& work = *static_cast<Packing*>(context);
    const Layer& layer = work.layer;
    const int bits = static_cast<int>(layer.bits);
    const int64_t size = layer.group_size(), per_group = layer.units_per_group();
    int word[kUnit], shift[kUnit];
    for (int k = 0; k < kUnit; ++k) place_of(bits, k, word + k, shift + k);
    uint32_t* to = work.words + block * layer.units() * bits * kLanes;
    for (int64_t unit = 0; unit < layer.units(); ++unit, to += bits * kLanes) {
        const int64_t k = unit % per_group * kUnit, count = smaller(kUnit, size - k);
        for (int64_t n = 0; n < kLanes; ++n) {
            const int64_t row = block * kLanes + n;
            uint32_t lane[8] = {0};
            if (row < layer.out_features) {
                const uint8_t* codes = work.codes + row * layer.in_features + unit / per_group * size + k;
                for (int64_t i = 0; i < count; ++i) lane[word[i]] |= static_cast<uint32_t>(codes[i]) << shift[i];
            }
            if (bits == 3) {
                for (int v = 0; v < 3; ++v) lane[v] |= (lane[3] >> 2 * v & 0x03030303) << 6;
            }
            for (int v = 0; v < bits; ++v) to[v * kLanes + n] = lane[v];
        }
    }
}

void unpack_block(void* context, int64_t block) {
    Packing& work = *static_cast<Packing*>(context);
    const Layer& layer = work.layer;
    const int bits = static_cast<int>(layer.bits);
    const int64_t size = layer.group_size(), per_group = layer.units_per_group();
    int word[kUnit], shift[kUnit];
    for (int k = 0; k < kUnit; ++k) place_of(bits, k, word + k, shift + k);
    const uint32_t* from = layer.block_words(block);
    for (int64_t unit = 0; unit < layer.units(); ++unit, from += bits * kLanes) {
        const int64_t k = unit % per_group * kUnit, count = smaller(kUnit, size - k);
        for (int64_t n = 0; n < kLanes && block * kLanes + n < layer.out_features; ++n) {
            uint32_t lane[8];
            for (int v = 0; v < bits; ++v) lane[v] = from[v * kLanes + n];
            if (bits == 3) {
                lane[3] = (lane[0] >> 6 & 0x03030303) | (lane[1] >> 4 & 0x0c0c0c0c) | (lane[2] >> 2 & 0x30303030);
            }
            uint8_t* codes = work.codes + (block * kLanes + n) * layer.in_features + unit / per_group * size + k;
            for (int64_t i = 0; i < count; ++i) {
                codes[i] = static_cast<uint8_t>(lane[word[i]] >> shift[i] & ((1u << bits) - 1));
            }
        }
    }
}

struct Dequantizing {
    Layer layer;
    const LinearKernels* kernels;
    const RowKernels* rows;
    int64_t first_row, count;
    int dtype;
    int64_t element;
    char* q;
};

void dequantize_block(void* context, int64_t task) {
    const Dequantizing& work = *static_cast<Dequantizing*>(context);
    const Layer& layer = work.layer;
    const int64_t size = layer.group_size(), per_group = layer.units_per_group();
    const int64_t rows = smaller(kLanes, work.count - task * kLanes);
    for (int64_t unit = 0; unit < layer.units(); ++unit) {
        alignas(64) float q[kUnit * kLanes];
        float row[kUnit];
        work.kernels->decode(layer, work.first_row / kLanes + task, unit, q);
        const int64_t k = unit % per_group * kUnit, count = smaller(kUnit, size - k);
        for (int64_t n = 0; n < rows; ++n) {
            for (int64_t i = 0; i < count; ++i) row[i] = q[i * kLanes + n];
            const int64_t at = (task * kLanes + n) * layer.in_features + unit / per_group * size + k;
            work.rows->from_float(row, work.dtype, count, work.q + at * work.element);
        }
    }
}

}  // namespace
}  // namespace cloq

void cloq_pack_weight(const cloq_weight* weight, const uint8_t* codes, uint32_t* words, int threads) {
    cloq::Packing work = {cloq::layer_of(*weight), const_cast<uint8_t*>(codes), words};
    cloq::parallel_for(work.layer.blocks(), threads, cloq::pack_block, &work);
}

void cloq_unpack_weight(const cloq_weight* weight, uint8_t* codes, int threads) {
    cloq::Packing work = {cloq::layer_of(*weight), codes, nullptr};
    cloq::parallel_for(work.layer.blocks(), threads, cloq::unpack_block, &work);
}

void cloq_dequantize(const cloq_weight* weight, int64_t first_row, int64_t rows, int dtype, void* q, int threads) {
    cloq::Dequantizing work = {cloq::layer_of(*weight),
                               cloq::linear_kernels(static_cast<int>(weight->bits)),
                               cloq::row_kernels(),
                               first_row,
                               rows,
                               dtype,
                               dtype == CLOQ_FLOAT32 ? 4 : 2,
                               static_cast<char*>(q)};
    cloq::parallel_for(cloq::ceil_div(rows, cloq::kLanes), threads, cloq::dequantize_block, &work);
}

int cloq_linear(const cloq_weight* weight, const void* x, int64_t tokens, int dtype, const float* bias,
                const cloq_lora* lora, int int8_activations, int deterministic, void* y, int threads) {
    if (lora != nullptr && lora->index != nullptr) {
        for (int64_t token = 0; token < tokens; ++token) {
            if (lora->index[token] >= lora->adapters) return 1;
        }
    }
    cloq::Linear work = {};
    work.layer = cloq::layer_of(*weight);
    work.kernels = cloq::linear_kernels(static_cast<int>(weight->bits));
    work.rows = cloq::row_kernels();
    work.dtype = dtype;
    work.element = dtype == CLOQ_FLOAT32 ? 4 : 2;
    work.bias = bias;
    work.lora = lora;
    work.int8 = int8_activations != 0;
    work.deterministic = deterministic != 0;
    for (int64_t first = 0; first < tokens; first += cloq::kPassRows) {
        work.tokens = cloq::smaller(cloq::kPassRows, tokens - first);
        work.x = static_cast<const char*>(x) + first * weight->in_features * work.element;
        work.y = static_cast<char*>(y) + first * weight->out_features * work.element;
        work.index = lora != nullptr && lora->index != nullptr ? lora->index + first : nullptr;
        cloq::run_pass(work, threads);
    }
    return 0;
}

void cloq_linear_input_grad(const cloq_weight* weight, const void* grad, int64_t tokens, int dtype, void* x_grad,
                            int threads) {
    cloq::InputGrad work = {};
    work.layer = cloq::layer_of(*weight);
    work.kernels = cloq::linear_kernels(static_cast<int>(weight->bits));
    work.rows = cloq::row_kernels();
    work.dtype = dtype;
    work.element = dtype == CLOQ_FLOAT32 ? 4 : 2;
    for (int64_t first = 0; first < tokens; first += cloq::kTileRows) {
        work.tokens = cloq::smaller(cloq::kTileRows, tokens - first);
        work.grad = static_cast<const char*>(grad) + first * weight->out_features * work.element;
        work.x_grad = static_cast<char*>(x_grad) + first * weight->in_features * work.element;
        cloq::run_grad_pass(work, threads);
    }
}
