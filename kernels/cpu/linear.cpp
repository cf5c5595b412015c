// The linear operations: activations are brought into the order that the kernels read, blocks of output channels are
// dealt to threads, and what a block gives is finished with bias and low-rank term. Every number is computed by one
// task in a fixed order, so the number of threads changes nothing.
#include "linear.h"

#include <math.h>
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

enum Mode { kFloat32, kInt8, kTables, kTiles };

struct Linear {
    Layer layer;
    const LinearKernels* kernels;
    const RowKernels* rows;
    const char* x;
    char* y;
    int64_t tokens;  // of this pass, at most kTileRows
    int dtype;
    int64_t element;
    const float* bias;
    const cloq_lora* lora;
    const int32_t* index;  // of this pass
    bool int8;
    Mode mode;

    // One token wide or more; chunks of tokens are padded to one of the kernels' widths.
    int64_t width, chunks;
    BlockKernel kernel;
    int64_t blocks_per_task;

    float* values;      // (tokens, in): only where the low-rank term needs them
    char* activations;  // as BlockKernel or TileWork takes them
    float* sums;        // (chunks, groups, width)
    float* steps;       // (tokens): what one step of an 8-bit activation is worth
    float* z;           // (rank, tokens): scaling * A x

    // A table of sixteen floats stands for two channels.
    int64_t channel_bytes() const { return mode == kFloat32 ? 4 : mode == kInt8 ? 1 : 32; }
    int64_t chunk_bytes() const { return layer.padded_in() * width * channel_bytes(); }
    int adapter(int64_t token) const { return lora == nullptr ? -1 : index == nullptr ? 0 : index[token]; }
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

// Round to 255 steps between -max and max; returns the step. Values become whole numbers.
float quantize_row(float* row, int64_t count) {
    float largest = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
        const float size = fabsf(row[k]);
        if (!(size <= largest)) largest = size;  // NaN is taken too, and spreads as it would in floats
    }
    if (largest == 0.0f) return 0.0f;
    const float step = largest / 127.0f, inverse = 127.0f / largest;
    for (int64_t k = 0; k < count; ++k) row[k] = nearbyintf(row[k] * inverse);
    return step;
}

void prepare_token(void* context, int64_t token) {
    Linear& work = *static_cast<Linear*>(context);
    const Layer& layer = work.layer;
    const int64_t in = layer.in_features, size = layer.group_size(), padded = layer.units_per_group() * kUnit;
    task_arena.reset(2 * static_cast<size_t>(in) * sizeof(float), 2);
    float* row = work.values != nullptr ? work.values + token * in : task_arena.take<float>(in);
    work.rows->to_float(work.x + token * in * work.element, work.dtype, in, row);
    if (work.mode == kTiles) {
        // Tiles of 16 tokens by 32 channels. The activations are bfloat16 already.
        const uint16_t* from = reinterpret_cast<const uint16_t*>(work.x) + token * in;
        uint16_t* to = reinterpret_cast<uint16_t*>(work.activations) + token / 16 * layer.units() * 512 + token % 16 * kUnit;
        for (int64_t group = 0; group < layer.groups; ++group) {
            for (int64_t k = 0; k < padded; k += kUnit, to += 512) {
                const int64_t count = smaller(kUnit, size - k);
                memcpy(to, from + group * size + k, static_cast<size_t>(count) * 2);
                memset(to + count, 0, static_cast<size_t>(kUnit - count) * 2);
            }
        }
        return;
    }
    const int64_t width = work.width, chunk = token / width, m = token % width;
    float* sums = work.sums + chunk * layer.groups * width + m;
    char* to = work.activations + chunk * work.chunk_bytes();
    float* source = row;
    if (work.int8) {
        if (work.values != nullptr) {  // the low-rank term takes the activations as they are
            source = task_arena.take<float>(in);
            memcpy(source, row, static_cast<size_t>(in) * sizeof(float));
        }
        work.steps[token] = quantize_row(source, in);
    }
    uint8_t order[kUnit];
    if (work.mode == kInt8) int8_order(layer.bits, order);
    for (int64_t group = 0; group < layer.groups; ++group) {
        const float* here = source + group * size;
        // Eight sums side by side: one alone would wait for itself, and its rounding errors would add up.
        float parts[8] = {0};
        int64_t k = 0;
        for (; k + 8 <= size; k += 8) {
            for (int i = 0; i < 8; ++i) parts[i] += here[k + i];
        }
        for (; k < size; ++k) parts[k % 8] += here[k];
        sums[group * width] = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
        const int64_t base = group * padded;
        if (work.mode == kFloat32) {
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

constexpr int64_t kRankRows = 4;
constexpr int64_t kRankTokens = 32;

// z of some rows of A for some tokens. Tasks of the same tokens follow each other, so that these stay in the cache.
void low_rank_task(void* context, int64_t task) {
    Linear& work = *static_cast<Linear*>(context);
    const cloq_lora& lora = *work.lora;
    const int64_t in = work.layer.in_features, element = lora.dtype == CLOQ_FLOAT32 ? 4 : 2;
    const int64_t row_tasks = ceil_div(lora.rank, kRankRows);
    const int64_t r = task % row_tasks * kRankRows, rows = smaller(kRankRows, lora.rank - r);
    const int64_t first = task / row_tasks * kRankTokens, last = smaller(work.tokens, first + kRankTokens);
    adapter_runs(work, first, last, [&](int adapter, int64_t from, int64_t count) {
        const char* a = static_cast<const char*>(lora.a) + (adapter * lora.rank + r) * in * element;
        float* to = work.z + r * work.tokens + from;
        work.rows->dots(a, static_cast<int>(lora.dtype), rows, in, work.values + from * in, in, count, to, work.tokens);
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < count; ++i) to[row * work.tokens + i] *= lora.scaling[adapter];
        }
    });
}

// Add bias and low-rank term to the sums of a block for tokens first .. first+count-1, `pitch` apart, and store them.
void finish(const Linear& work, int64_t block, int64_t first, int64_t count, float* sums, int64_t pitch) {
    const int64_t out = work.layer.out_features, column = block * kLanes, columns = smaller(kLanes, out - column);
    if (work.int8) {
        for (int64_t i = 0; i < count; ++i) {
            for (int n = 0; n < kLanes; ++n) sums[i * pitch + n] *= work.steps[first + i];
        }
    }
    if (work.lora != nullptr) {
        const cloq_lora& lora = *work.lora;
        const int64_t element = lora.dtype == CLOQ_FLOAT32 ? 4 : 2;
        adapter_runs(work, first, first + count, [&](int adapter, int64_t from, int64_t run) {
            const int64_t at = (adapter * work.layer.blocks() + block) * lora.rank * kLanes;
            work.rows->add_low_rank(static_cast<const char*>(lora.b) + at * element, static_cast<int>(lora.dtype), lora.rank,
                                    work.z + from, work.tokens, run, sums + (from - first) * pitch, pitch);
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
    const int64_t last = smaller(work.layer.blocks(), (task + 1) * work.blocks_per_task);
    for (int64_t block = task * work.blocks_per_task; block < last; ++block) {
        for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
            alignas(64) float sums[kMaxTokens * kLanes];
            work.kernel(work.layer, block, work.activations + chunk * work.chunk_bytes(),
                        work.sums + chunk * work.layer.groups * work.width, sums);
            const int64_t count = smaller(work.width, work.tokens - chunk * work.width);
            finish(work, block, chunk * work.width, count, sums, kLanes);
        }
    }
}

void multiply_tiles(void* context, int64_t task) {
    const Linear& work = *static_cast<Linear*>(context);
    TileWork tiles;
    tiles.layer = &work.layer;
    tiles.block = task * work.blocks_per_task;
    tiles.blocks = smaller(work.blocks_per_task, work.layer.blocks() - tiles.block);
    tiles.x = reinterpret_cast<const uint16_t*>(work.activations);
    tiles.row_tiles = ceil_div(work.tokens, 16);
    const int64_t sums = tiles.row_tiles * 16 * kTileBlocks * kLanes;
    task_arena.reset(static_cast<size_t>(sums) * 4 + static_cast<size_t>(kTilePanel) * 2, 2);
    tiles.y = task_arena.take<float>(sums);
    tiles.panel = task_arena.take<uint16_t>(kTilePanel);
    work.kernels->tiles(tiles);
    // A few tokens at a time share the loads of B, and their rows of the output are written while they are near.
    constexpr int64_t kTogether = 8;
    for (int64_t token = 0; token < work.tokens; token += kTogether) {
        const int64_t count = smaller(kTogether, work.tokens - token);
        for (int64_t block = 0; block < tiles.blocks; ++block) {
            float* sums = tiles.y + (token * kTileBlocks + block) * kLanes;
            finish(work, tiles.block + block, token, count, sums, kTileBlocks * kLanes);
        }
    }
}

// The widest kernel, or for few tokens the narrowest that holds them; many tokens are spread evenly over chunks.
void choose_width(Linear& work, const BlockKernel* table) {
    const int* widths = work.kernels->widths;
    int widest = 0;
    while (widths[widest + 1] != 0) ++widest;
    const int64_t chunks = ceil_div(work.tokens, widths[widest]);
    const int64_t wanted = ceil_div(work.tokens, chunks);
    int pick = 0;
    while (widths[pick] < wanted) ++pick;
    work.width = widths[pick];
    work.chunks = ceil_div(work.tokens, work.width);
    work.kernel = table[pick];
}

void run_pass(Linear& work, int threads) {
    const Layer& layer = work.layer;
    const LinearKernels& kernels = *work.kernels;
    work.mode = kFloat32;
    if (work.int8) {
        if (kernels.int8 != nullptr) work.mode = kInt8;
    } else if (work.dtype == CLOQ_BFLOAT16 && kernels.tiles != nullptr && work.tokens >= kernels.tiles_from) {
        work.mode = kTiles;
    } else if (work.tokens == 1 && kernels.by_table != nullptr) {
        work.mode = kTables;
    }
    const int64_t row_tiles = ceil_div(work.tokens, 16);
    int64_t activation_bytes;
    if (work.mode == kTiles) {
        work.width = work.chunks = 1;
        activation_bytes = row_tiles * layer.units() * 1024;
    } else if (work.mode == kTables) {
        work.width = work.chunks = 1;
        work.kernel = kernels.by_table;
        activation_bytes = work.chunk_bytes();
    } else {
        choose_width(work, work.mode == kInt8 ? kernels.int8 : kernels.float32);
        activation_bytes = work.chunks * work.chunk_bytes();
    }
    const int64_t value_count = work.lora != nullptr ? work.tokens * layer.in_features : 0;
    const int64_t sum_count = work.chunks * layer.groups * work.width;
    const int64_t z_count = work.lora != nullptr ? work.lora->rank * work.tokens : 0;
    call_arena.reset(static_cast<size_t>(activation_bytes) +
                         4 * static_cast<size_t>(value_count + sum_count + work.tokens + z_count), 5);
    work.activations = call_arena.take<char>(activation_bytes);
    work.values = value_count > 0 ? call_arena.take<float>(value_count) : nullptr;
    work.sums = call_arena.take<float>(sum_count);
    work.steps = call_arena.take<float>(work.tokens);
    work.z = call_arena.take<float>(z_count);
    if (work.mode == kTiles ? work.tokens % 16 != 0 : work.tokens < work.chunks * work.width) {
        // Rows of the last chunk or tile that no token fills must be numbers.
        memset(work.activations, 0, static_cast<size_t>(activation_bytes));
        memset(work.sums, 0, static_cast<size_t>(sum_count) * sizeof(float));
    }
    parallel_for(work.tokens, work.tokens * layer.in_features < 65536 ? 1 : threads, prepare_token, &work);
    if (work.lora != nullptr) {
        const int64_t tasks = ceil_div(work.lora->rank, kRankRows) * ceil_div(work.tokens, kRankTokens);
        const bool small = work.tokens * layer.in_features * work.lora->rank < 65536;
        parallel_for(tasks, small ? 1 : threads, low_rank_task, &work);
    }
    const int64_t blocks = layer.blocks();
    if (work.mode == kTiles) {
        // Wide panels reuse the activations, but every thread should have some.
        work.blocks_per_task = smaller(kTileBlocks, ceil_div(blocks, threads > 0 ? threads : 1));
        parallel_for(ceil_div(blocks, work.blocks_per_task), threads, multiply_tiles, &work);
    } else {
        work.blocks_per_task = blocks >= 8 * threads ? 2 : 1;
        parallel_for(ceil_div(blocks, work.blocks_per_task), threads, multiply_blocks, &work);
    }
}

Layer layer_of(const cloq_weight& weight) {
    return {weight.words, weight.scales, weight.zeros, weight.out_features, weight.in_features, weight.groups, weight.bits};
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

void cloq_linear(const cloq_weight* weight, const void* x, int64_t tokens, int dtype, const float* bias,
                 const cloq_lora* lora, int int8_activations, void* y, int threads) {
    cloq::Linear work = {};
    work.layer = cloq::layer_of(*weight);
    work.kernels = cloq::linear_kernels(static_cast<int>(weight->bits));
    work.rows = cloq::row_kernels();
    work.dtype = dtype;
    work.element = dtype == CLOQ_FLOAT32 ? 4 : 2;
    work.bias = bias;
    work.lora = lora;
    work.int8 = int8_activations != 0;
    for (int64_t first = 0; first < tokens; first += cloq::kTileRows) {
        work.tokens = cloq::smaller(cloq::kTileRows, tokens - first);
        work.x = static_cast<const char*>(x) + first * weight->in_features * work.element;
        work.y = static_cast<char*>(y) + first * weight->out_features * work.element;
        work.index = lora != nullptr && lora->index != nullptr ? lora->index + first : nullptr;
        cloq::run_pass(work, threads);
    }
}
