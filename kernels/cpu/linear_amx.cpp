// bfloat16 activations on AMX: a panel of blocks is decoded to bfloat16 tiles, which many tokens then share.
//
// The weights are rounded to bfloat16 once, as a bfloat16 layer would hold them; sums are float32. Low-rank factors and
// what stands between them are bfloat16 here too.
#include <immintrin.h>
#include <stdint.h>

#include "cloq_cpu.h"
#include "linear.h"
#include "vector_avx512.h"

namespace {

using cloq::ceil_div;
using cloq::kTile;

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {0};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64, 0};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16, 0};
};

// Even and odd sixteens, as _mm512_cvtne2ps_pbh gives them, side by side.
inline __m512i interleaving() {
    alignas(64) uint16_t order[32];
    for (int n = 0; n < 16; ++n) {
        order[2 * n] = static_cast<uint16_t>(n);
        order[2 * n + 1] = static_cast<uint16_t>(n + 16);
    }
    return _mm512_load_si512(order);
}

// What a unit's codes are multiplied with, and what is added: Q = scale * (code - middle) + offset.
struct Grid {
    __m512 scale, offset;

    Grid(const cloq::Layer& layer, int64_t block, int64_t group) {
        const Vector zero = Vector::bytes(layer.block_zeros(block) + group * cloq::kLanes) -
                            Vector::all(static_cast<float>(cloq::middle(static_cast<int>(layer.bits))));
        scale = Vector::half(layer.block_scales(block) + group * cloq::kLanes).v;
        offset = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(scale, zero.v));
    }
};

// One unit of one block: 16 rows of pairs, each 16 output channels by 2 input channels.
template <int bits>
inline void decode_tile(const Codes<bits>& codes, const uint32_t* words, const Grid& grid, __m512i interleave,
                        uint16_t* tile) {
    constexpr int kWords = cloq::virtual_words(bits), kSlots = cloq::slots(bits);
    __m512i unpacked[kWords];
    codes.load(words, unpacked);
#pragma GCC unroll 8
    for (int v = 0; v < kWords; ++v) {
#pragma GCC unroll 2
        for (int byte = 0; byte < 2; ++byte) {
#pragma GCC unroll 4
            for (int slot = 0; slot < kSlots; ++slot) {
                const int pair = (v * 2 + byte) * kSlots + slot;
                const __m512 even = _mm512_fmadd_ps(codes.centred(unpacked[v], byte, slot).v, grid.scale, grid.offset);
                const __m512 odd =
                    _mm512_fmadd_ps(codes.centred(unpacked[v], byte + 2, slot).v, grid.scale, grid.offset);
                const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
                _mm512_store_si512(tile + pair * 32, _mm512_permutexvar_epi16(interleave, both));
            }
        }
    }
}

template <int bits>
void decode_panel(const cloq::TileWork& work, int64_t first_unit, int64_t units) {
    const cloq::Layer& layer = *work.layer;
    const Codes<bits> codes;
    const __m512i interleave = interleaving();
    const int64_t per_group = layer.units_per_group();
    for (int64_t block = 0; block < work.blocks; ++block) {
        const uint32_t* words = layer.block_words(work.block + block) + first_unit * bits * cloq::kLanes;
        uint16_t* tile = work.panel + block * cloq::kTileUnits * kTile;
        for (int64_t unit = first_unit; unit < first_unit + units; ++unit) {
            decode_tile<bits>(codes, words, Grid(layer, work.block + block, unit / per_group), interleave, tile);
            words += bits * cloq::kLanes;
            tile += kTile;
        }
    }
}

// Lines that a step along the sum fetches for later: two rows of tiles pass while eight pairs of columns take turns.
constexpr int64_t kLinesPerStep = 4;
constexpr int64_t kLine = 32;  // entries

// One or two tiles of rows by one or two tiles of columns; the tiles of a row, or of a column, follow each other along
// the sum. y is `pitch` floats wide. Columns stay in the first-level cache, rows pass through it; `next` comes later.
template <int rows, int columns>
inline void multiply(const uint16_t* a, int64_t a_pitch, const uint16_t* b, int64_t b_pitch, int64_t units, bool first,
                     const uint16_t* next, float* y, int64_t pitch) {
    const int64_t stride = pitch * static_cast<int64_t>(sizeof(float)), below = pitch * 16;
    if (first) {
        _tile_zero(0);
        if (columns > 1) _tile_zero(1);
        if (rows > 1) _tile_zero(2);
        if (rows > 1 && columns > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, y, stride);
        if (columns > 1) _tile_loadd(1, y + 16, stride);
        if (rows > 1) _tile_loadd(2, y + below, stride);
        if (rows > 1 && columns > 1) _tile_loadd(3, y + below + 16, stride);
    }
    for (int64_t unit = 0; unit < units; ++unit) {
        _tile_loadd(6, b + unit * kTile, 64);
        _tile_stream_loadd(4, a + unit * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (columns > 1) {
            _tile_loadd(7, b + b_pitch + unit * kTile, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (rows > 1) {
            _tile_stream_loadd(5, a + a_pitch + unit * kTile, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (columns > 1) _tile_dpbf16ps(3, 5, 7);
        }
        if (next != nullptr) {
            for (int64_t line = 0; line < kLinesPerStep; ++line, next += kLine) _mm_prefetch(next, _MM_HINT_T1);
        }
    }
    _tile_stored(0, y, stride);
    if (columns > 1) _tile_stored(1, y + 16, stride);
    if (rows > 1) _tile_stored(2, y + below, stride);
    if (rows > 1 && columns > 1) _tile_stored(3, y + below + 16, stride);
}

// Where the call number `call` of those that share two rows (or columns) of tiles at `tiles` fetches from.
inline const uint16_t* piece(const uint16_t* tiles, int64_t pitch, int64_t units, int64_t call) {
    const int64_t calls = ceil_div(units * kTile, units * kLinesPerStep * kLine);  // for one row
    return tiles + call / calls * pitch + call % calls * units * kLinesPerStep * kLine;
}

// All tiles of rows by all tiles of columns. a_ahead: how far behind a its next use begins, 0 for none; then the
// columns' next pair is fetched. Calls before(column) at every pair of columns.
template <class Before>
void multiply_all(const uint16_t* a, int64_t a_pitch, int64_t rows, const uint16_t* b, int64_t b_pitch, int64_t columns,
                  int64_t units, bool first, int64_t a_ahead, float* y, int64_t pitch, Before before) {
    for (int64_t column = 0; column < columns; column += 2) {
        const bool two_columns = column + 1 < columns;
        before(column);
        for (int64_t row = 0; row < rows; row += 2) {
            const bool two_rows = row + 1 < rows;
            const auto run = two_columns ? (two_rows ? multiply<2, 2> : multiply<1, 2>)
                                         : (two_rows ? multiply<2, 1> : multiply<1, 1>);
            const uint16_t* next = nullptr;
            if (a_ahead != 0) {
                next = piece(a + row * a_pitch + a_ahead, a_pitch, units, column / 2);
            } else if (column + 2 < columns) {
                next = piece(b + (column + 2) * b_pitch, b_pitch, units, row / 2);
            }
            run(a + row * a_pitch, a_pitch, b + column * b_pitch, b_pitch, units, first, next,
                y + (row * pitch + column) * 16, pitch);
        }
    }
}

constexpr TileConfig kConfig{};

// Two runs of sixteen numbers of a low-rank factor, as even and odd elements of pairs.
inline __m512i pairs_of(const void* b, int dtype, int64_t at, int64_t next, bool has_next, __m512i interleave) {
    const __m512 even = load_row(b, dtype, at, 0xffff);
    const __m512 odd = has_next ? load_row(b, dtype, next, 0xffff) : _mm512_setzero_ps();
    return _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Adds z B^T of one slice to the row tiles from `row` to `last` - 1, which are of one adapter: the part of its B that
// belongs to blocks `block` to `end` - 1 becomes a panel of up to kTileUnits units.
void add_low_rank_slice(const cloq::TileWork& work, int64_t row, int64_t last, int64_t slice, int64_t block, int64_t end) {
    const cloq::TileLora& tiles = *work.lora;
    const cloq_lora& lora = *tiles.lora;
    const __m512i interleave = interleaving();
    const int64_t element = lora.dtype == CLOQ_FLOAT32 ? 4 : 2, adapter = tiles.adapters[row];
    const int dtype = static_cast<int>(lora.dtype);
    const int64_t rank = lora.ranks[adapter * lora.slices + slice], rank_units = cloq::ceil_div(rank, cloq::kUnit);
    constexpr int64_t kPitch = cloq::kTileBlocks * cloq::kLanes;
    for (int64_t unit = 0; unit < rank_units; unit += cloq::kTileUnits) {
        const int64_t units = cloq::smaller(cloq::kTileUnits, rank_units - unit);
        for (int64_t b = block; b < end; ++b) {
            const char* from = static_cast<const char*>(lora.b) +
                               (adapter * work.layer->blocks() + b) * lora.rank * cloq::kLanes * element;
            uint16_t* tile = work.panel + (b - block) * cloq::kTileUnits * kTile;
            for (int64_t r = unit * cloq::kUnit; r < (unit + units) * cloq::kUnit; r += 2, tile += 32) {
                const __m512i both = r < rank ? pairs_of(from, dtype, r * cloq::kLanes, (r + 1) * cloq::kLanes,
                                                         r + 1 < rank, interleave)
                                              : _mm512_setzero_si512();
                _mm512_storeu_si512(tile, both);
            }
        }
        multiply_all(tiles.z + ((row * lora.slices + slice) * tiles.rank_units + unit) * kTile,
                     lora.slices * tiles.rank_units * kTile, last - row, work.panel, cloq::kTileUnits * kTile, end - block,
                     units, false, 0, work.y + row * 16 * kPitch + (block - work.block) * cloq::kLanes, kPitch,
                     [](int64_t) {});
    }
}

void add_low_rank_tiles(const cloq::TileWork& work) {
    const cloq::TileLora& tiles = *work.lora;
    for (int64_t row = 0, last; row < work.row_tiles; row = last) {
        for (last = row + 1; last < work.row_tiles && tiles.adapters[last] == tiles.adapters[row]; ++last) {
        }
        if (tiles.adapters[row] < 0) continue;
        int64_t block = work.block;
        for (int64_t slice = 0; slice < tiles.lora->slices; ++slice) {
            const int64_t end = cloq::smaller(tiles.lora->ends[slice], work.block + work.blocks);
            if (end <= block) continue;
            add_low_rank_slice(work, row, last, slice, block, end);
            block = end;
        }
    }
}

template <int bits>
void run_tiles(const cloq::TileWork& work) {
    _tile_loadconfig(&kConfig);
    const int64_t all_units = work.layer->units();
    for (int64_t unit = 0; unit < all_units; unit += cloq::kTileUnits) {
        const int64_t units = cloq::smaller(cloq::kTileUnits, all_units - unit);
        decode_panel<bits>(work, unit, units);
        const int64_t after = cloq::smaller(cloq::kTileUnits, all_units - unit - units);
        const auto fetch_words = [&](int64_t column) {
            for (int64_t block = column; block < cloq::smaller(column + 2, work.blocks); ++block) {
                const uint32_t* words = work.layer->block_words(work.block + block) + (unit + units) * bits * cloq::kLanes;
                for (int64_t line = 0; line < after * bits; ++line) _mm_prefetch(words + line * 16, _MM_HINT_T1);
            }
        };
        multiply_all(work.x + unit * kTile, all_units * kTile, work.row_tiles, work.panel, cloq::kTileUnits * kTile,
                     work.blocks, units, unit == 0, after > 0 ? units * kTile : 0, work.y,
                     cloq::kTileBlocks * cloq::kLanes, fetch_words);
    }
    if (work.lora != nullptr) add_low_rank_tiles(work);
    _tile_release();
}

void pack_ranks(const cloq::Layer& layer, const void* a, int dtype, int64_t rows, uint16_t* to) {
    const int64_t in = layer.in_features, size = layer.group_size(), per_group = layer.units_per_group();
    for (int64_t unit = 0; unit < layer.units(); ++unit, to += kTile) {
        const int64_t k = unit % per_group * cloq::kUnit, count = cloq::smaller(cloq::kUnit, size - k);
        const int64_t low = cloq::smaller(cloq::kLanes, count), high = count - low;
        uint32_t pairs[16][16];
        for (int64_t rank = 0; rank < 16; ++rank) {
            __m512i both = _mm512_setzero_si512();
            if (rank < rows) {
                const int64_t at = rank * in + unit / per_group * size + k;
                const __m512 first = load_row(a, dtype, at, static_cast<__mmask16>((1u << low) - 1));
                const __m512 second = load_row(a, dtype, at + cloq::kLanes, static_cast<__mmask16>((1u << high) - 1));
                both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
            }
            _mm512_storeu_si512(pairs[rank], both);
        }
        uint32_t* tile = reinterpret_cast<uint32_t*>(to);
        for (int pair = 0; pair < 16; ++pair) {
            for (int rank = 0; rank < 16; ++rank) tile[pair * 16 + rank] = pairs[rank][pair];
        }
    }
}

void shrink(const uint16_t* x, int64_t units, const uint16_t* ranks, int64_t rank_tiles, const float* factors,
            uint16_t* z) {
    _tile_loadconfig(&kConfig);
    for (int64_t tile = 0; tile < rank_tiles; tile += 2, z += kTile) {
        alignas(64) float sums[16 * 32];
        const bool two = tile + 1 < rank_tiles;
        (two ? multiply<1, 2> : multiply<1, 1>)(x, 0, ranks + tile * units * kTile, units * kTile, units, true, nullptr,
                                                sums, 32);
        for (int row = 0; row < 16; ++row) {
            const __m512 factor = _mm512_set1_ps(factors[row]);
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(sums + row * 32), factor);
            const __m512 high = two ? _mm512_mul_ps(_mm512_load_ps(sums + row * 32 + 16), factor) : _mm512_setzero_ps();
            _mm512_storeu_si512(z + row * 32, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        }
    }
    _tile_release();
}

// Q of one unit and two blocks, transposed: two tiles of 16 input channels by 32 output channels.
template <int bits>
inline void decode_transposed(const Codes<bits>& codes, const uint32_t* low, const uint32_t* high, const Grid& low_grid,
                              const Grid& high_grid, uint16_t* tiles, int64_t tile_pitch) {
    constexpr int kWords = cloq::virtual_words(bits), kSlots = cloq::slots(bits);
    __m512i left[kWords], right[kWords];
    codes.load(low, left);
    codes.load(high, right);
#pragma GCC unroll 8
    for (int v = 0; v < kWords; ++v) {
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; ++byte) {
#pragma GCC unroll 4
            for (int slot = 0; slot < kSlots; ++slot) {
                const int channel = 2 * ((v * 2 + byte % 2) * kSlots + slot) + byte / 2;
                const __m512 first = _mm512_fmadd_ps(codes.centred(left[v], byte, slot).v, low_grid.scale, low_grid.offset);
                const __m512 second =
                    _mm512_fmadd_ps(codes.centred(right[v], byte, slot).v, high_grid.scale, high_grid.offset);
                uint16_t* row = tiles + channel / 16 * tile_pitch + channel % 16 * 32;
                _mm512_storeu_si512(row, (__m512i)_mm512_cvtne2ps_pbh(second, first));
            }
        }
    }
}

template <int bits>
void run_grad_tiles(const cloq::GradWork& work) {
    _tile_loadconfig(&kConfig);
    const cloq::Layer& layer = *work.layer;
    const Codes<bits> codes;
    const int64_t blocks = layer.blocks(), pairs = cloq::ceil_div(blocks, 2), per_group = layer.units_per_group();
    const uint16_t* grad = static_cast<const uint16_t*>(work.grad);
    uint16_t* panel = static_cast<uint16_t*>(work.panel);  // (channel tiles, kGradBlocks pairs, tile)
    constexpr int64_t kPitch = cloq::kGradBlocks * kTile;
    for (int64_t pair = 0; pair < pairs; pair += cloq::kGradBlocks) {
        const int64_t count = cloq::smaller(cloq::kGradBlocks, pairs - pair);
        for (int64_t p = 0; p < count; ++p) {
            const int64_t low = 2 * (pair + p), high = low + 1 < blocks ? low + 1 : low;
            for (int64_t u = 0; u < work.units; ++u) {
                const int64_t unit = work.unit + u, at = unit * bits * cloq::kLanes;
                Grid high_grid(layer, high, unit / per_group);
                // Past the last block stand zeros.
                if (high == low) high_grid.scale = high_grid.offset = _mm512_setzero_ps();
                decode_transposed<bits>(codes, layer.block_words(low) + at, layer.block_words(high) + at,
                                        Grid(layer, low, unit / per_group), high_grid,
                                        panel + u * 2 * kPitch + p * kTile, kPitch);
            }
        }
        multiply_all(panel, kPitch, work.units * 2, grad + pair * kTile, pairs * kTile, work.token_tiles, count, pair == 0,
                     0, work.y, work.token_tiles * 16, [](int64_t) {});
    }
    _tile_release();
}

}  // namespace

namespace cloq {

template <int bits>
static const LinearKernels* table() {
    static const LinearKernels kernels = [] {
        LinearKernels with_tiles = *linear_avx512(bits);
        with_tiles.tiles = run_tiles<bits>;
        with_tiles.tiles_from = 5;  // four tokens still take less in float32
        with_tiles.grad_tiles = run_grad_tiles<bits>;
        with_tiles.pack_ranks = pack_ranks;
        with_tiles.shrink = shrink;
        return with_tiles;
    }();
    return &kernels;
}

const LinearKernels* linear_amx(int bits) {
    switch (bits) {
        case 2: return table<2>();
        case 3: return table<3>();
        case 4: return table<4>();
        default: return table<8>();
    }
}

}  // namespace cloq
