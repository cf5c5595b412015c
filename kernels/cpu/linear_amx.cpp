// bfloat16 activations on AMX: a panel of blocks is decoded to bfloat16 tiles, which many tokens then share.
//
// The weights are rounded to bfloat16 once, as a bfloat16 layer would hold them; sums are float32.
#include <immintrin.h>
#include <stdint.h>

#include "linear.h"
#include "vector_avx512.h"

namespace {

constexpr int64_t kTile = 16 * 32;  // entries of a tile of activations or weights

// Rows of activation tiles that stay in the second-level cache while the pairs of blocks, each a panel small enough for
// the first level, take turns.
constexpr int64_t kRowChunk = 16;

struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {0};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64, 0};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16, 0};
};

// One unit of one block: 16 rows of pairs, each 16 output channels by 2 input channels.
template <int bits>
inline void decode_tile(const Codes<bits>& codes, const uint32_t* words, __m512 scale, __m512 offset, __m512i interleave,
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
                const __m512 even = _mm512_fmadd_ps(codes.centred(unpacked[v], byte, slot).v, scale, offset);
                const __m512 odd = _mm512_fmadd_ps(codes.centred(unpacked[v], byte + 2, slot).v, scale, offset);
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
    alignas(64) uint16_t order[32];
    for (int n = 0; n < 16; ++n) {
        order[2 * n] = static_cast<uint16_t>(n);
        order[2 * n + 1] = static_cast<uint16_t>(n + 16);
    }
    const __m512i interleave = _mm512_load_si512(order);
    const int64_t per_group = layer.units_per_group();
    for (int64_t block = 0; block < work.blocks; ++block) {
        const uint32_t* words = layer.block_words(work.block + block) + first_unit * bits * cloq::kLanes;
        uint16_t* tile = work.panel + block * cloq::kTileUnits * kTile;
        for (int64_t unit = first_unit; unit < first_unit + units; ++unit) {
            const int64_t group = unit / per_group;
            const Vector scale = Vector::half(layer.block_scales(work.block + block) + group * cloq::kLanes);
            const Vector zero =
                Vector::bytes(layer.block_zeros(work.block + block) + group * cloq::kLanes) - Vector::all(cloq::middle(bits));
            const __m512 offset = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(scale.v, zero.v));
            decode_tile<bits>(codes, words, scale.v, offset, interleave, tile);
            words += bits * cloq::kLanes;
            tile += kTile;
        }
    }
}

// Up to 2 by 2 tiles of output, over the units of one panel.
template <int rows, int blocks>
inline void multiply(const uint16_t* x, int64_t x_pitch, const uint16_t* panel, int64_t units, bool first, float* y) {
    constexpr int64_t pitch = cloq::kTileBlocks * cloq::kLanes * sizeof(float);
    constexpr int64_t below = cloq::kTileBlocks * cloq::kLanes * 16;
    if (first) {
        _tile_zero(0);
        if (blocks > 1) _tile_zero(1);
        if (rows > 1) _tile_zero(2);
        if (rows > 1 && blocks > 1) _tile_zero(3);
    } else {
        _tile_loadd(0, y, pitch);
        if (blocks > 1) _tile_loadd(1, y + 16, pitch);
        if (rows > 1) _tile_loadd(2, y + below, pitch);
        if (rows > 1 && blocks > 1) _tile_loadd(3, y + below + 16, pitch);
    }
    for (int64_t unit = 0; unit < units; ++unit) {
        _tile_loadd(6, panel + unit * kTile, 64);
        _tile_loadd(4, x + unit * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (blocks > 1) {
            _tile_loadd(7, panel + (cloq::kTileUnits + unit) * kTile, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (rows > 1) {
            _tile_loadd(5, x + x_pitch + unit * kTile, 64);
            _tile_dpbf16ps(2, 5, 6);
            if (blocks > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, y, pitch);
    if (blocks > 1) _tile_stored(1, y + 16, pitch);
    if (rows > 1) _tile_stored(2, y + below, pitch);
    if (rows > 1 && blocks > 1) _tile_stored(3, y + below + 16, pitch);
}

template <int bits>
void run_tiles(const cloq::TileWork& work) {
    static const TileConfig config;
    _tile_loadconfig(&config);
    const int64_t all_units = work.layer->units();
    const int64_t x_pitch = all_units * kTile;
    for (int64_t unit = 0; unit < all_units; unit += cloq::kTileUnits) {
        const int64_t units = cloq::smaller(cloq::kTileUnits, all_units - unit);
        decode_panel<bits>(work, unit, units);
        for (int64_t chunk = 0; chunk < work.row_tiles; chunk += kRowChunk) {
            const int64_t last = cloq::smaller(work.row_tiles, chunk + kRowChunk);
            for (int64_t block = 0; block < work.blocks; block += 2) {
                const uint16_t* panel = work.panel + block * cloq::kTileUnits * kTile;
                for (int64_t row = chunk; row < last; row += 2) {
                    const bool two_rows = row + 1 < last;
                    const uint16_t* x = work.x + row * x_pitch + unit * kTile;
                    float* y = work.y + (row * 16 * cloq::kTileBlocks + block) * cloq::kLanes;
                    if (block + 1 < work.blocks) {
                        (two_rows ? multiply<2, 2> : multiply<1, 2>)(x, x_pitch, panel, units, unit == 0, y);
                    } else {
                        (two_rows ? multiply<2, 1> : multiply<1, 1>)(x, x_pitch, panel, units, unit == 0, y);
                    }
                }
            }
        }
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
