// The linear kernels on AVX-512 with VBMI and VNNI: the sixteen lanes are one vector.
//
// bfloat16 activations are widened to float32 here. The instruction that multiplies pairs of bfloat16 saves the decoding
// of half the weights, but it takes two cycles where a multiply-add of float32 takes half of one: no gain for one token,
// a loss for several.
#include <immintrin.h>
#include <stdint.h>

#include <type_traits>

#include "cloq_cpu.h"
#include "linear.h"
#include "vector_avx512.h"

#include "linear_fp32.h"

namespace {

// 8-bit activations: four codes of a word meet four activations in one instruction, in whole numbers.
template <int bits, int width>
struct Int8Block {
    static constexpr int kWidth = width, kChains = width == 1 ? 4 : width == 2 ? 2 : 1;
    static constexpr int kWords = cloq::virtual_words(bits), kSlots = cloq::slots(bits);

    static void run(const cloq::Layer& layer, int64_t block, int64_t blocks, const void* x, const float* sums, float* y) {
        for (int64_t b = 0; b < blocks; ++b) {
            run_one(layer, block + b, static_cast<const int*>(x), sums, y + b * cloq::kLanes);
        }
    }

    static void run_one(const cloq::Layer& layer, int64_t block, const int* x, const float* sums, float* y) {
        const uint32_t* words = layer.block_words(block);
        const uint16_t* scales = layer.block_scales(block);
        const uint8_t* zeros = layer.block_zeros(block);
        const int64_t units = layer.units_per_group();
        const Codes<bits> codes;
        const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
        __m512 total[width];
        for (int m = 0; m < width; ++m) total[m] = _mm512_setzero_ps();
        for (int64_t group = 0; group < layer.groups; ++group) {
            __m512i sum[width * kChains];
            for (int i = 0; i < width * kChains; ++i) sum[i] = _mm512_setzero_si512();
            for (int64_t unit = 0; unit < units; ++unit) {
                __m512i unpacked[kWords];
                codes.load_plain(words, unpacked);
#pragma GCC unroll 8
                for (int v = 0; v < kWords; ++v) {
#pragma GCC unroll 4
                    for (int slot = 0; slot < kSlots; ++slot) {
                        const int quad = v * kSlots + slot;
                        const __m512i four = _mm512_and_si512(_mm512_srli_epi32(unpacked[v], bits * slot), mask);
#pragma GCC unroll 12
                        for (int m = 0; m < width; ++m) {
                            __m512i& to = sum[quad % kChains * width + m];
                            to = _mm512_dpbusd_epi32(to, four, _mm512_set1_epi32(x[quad * width + m]));
                        }
                    }
                }
                words += bits * cloq::kLanes;
                x += cloq::kUnit / 4 * width;
            }
            const Vector scale = Vector::half(scales + group * cloq::kLanes);
            const Vector zero = Vector::bytes(zeros + group * cloq::kLanes);
            for (int m = 0; m < width; ++m) {
                __m512i all = sum[m];
                for (int chain = 1; chain < kChains; ++chain) all = _mm512_add_epi32(all, sum[chain * width + m]);
                const __m512 centred =
                    _mm512_fnmadd_ps(zero.v, _mm512_set1_ps(sums[group * width + m]), _mm512_cvtepi32_ps(all));
                total[m] = _mm512_fmadd_ps(scale.v, centred, total[m]);
            }
        }
        for (int m = 0; m < width; ++m) _mm512_storeu_ps(y + m * cloq::kBlockPitch, total[m]);
    }
};

// 2 bits: a permutation reads four bits, which are two codes, so a table of what two channels add for each of their
// sixteen pairs of codes halves the work. Table order is that of the codes: words, bytes, slots.
// x: (channels of a unit, width). to: (pairs, width, 16).
template <int width>
void pair_tables_of(const float* x, float* to) {
    const __m512 first = _mm512_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1);
    const __m512 second = _mm512_setr_ps(-2, -2, -2, -2, -1, -1, -1, -1, 0, 0, 0, 0, 1, 1, 1, 1);
    for (int v = 0; v < 2; ++v) {
        for (int byte = 0; byte < 4; ++byte) {
            for (int slot = 0; slot < 4; slot += 2) {
                const float* here = x + (2 * ((v * 2 + byte % 2) * 4 + slot) + byte / 2) * width;
                for (int m = 0; m < width; ++m, to += 16) {
                    const __m512 part = _mm512_mul_ps(second, _mm512_set1_ps(here[2 * width + m]));
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(first, _mm512_set1_ps(here[m]), part));
                }
            }
        }
    }
}

void pair_tables(const float* x, float* to) { pair_tables_of<1>(x, to); }

// One token. Its sums are those of Float32Block with as many chains and with pairs.
constexpr int kTableChains = 2;

template <int blocks>
void multiply_by_table_of(const cloq::Layer& layer, int64_t block, const float* tables, const float* sums, float* y) {
    const uint32_t* words = layer.block_words(block);
    const int64_t units = layer.units_per_group(), block_words = layer.units() * 2 * cloq::kLanes;
    __m512 total[blocks];
    for (int b = 0; b < blocks; ++b) total[b] = _mm512_setzero_ps();
    for (int64_t group = 0; group < layer.groups; ++group) {
        __m512 sum[kTableChains][blocks];
        for (int b = 0; b < blocks; ++b) sum[0][b] = sum[1][b] = _mm512_setzero_ps();
        for (int64_t unit = 0; unit < units; ++unit) {
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                __m512i codes[blocks];
                for (int b = 0; b < blocks; ++b) {
                    codes[b] = _mm512_loadu_si512(words + b * block_words + v * cloq::kLanes);
                }
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) {
                    const __m512 table = _mm512_loadu_ps(tables + (v * 8 + i) * 16);
#pragma GCC unroll 2
                    for (int b = 0; b < blocks; ++b) {
                        const __m512i pair = _mm512_srli_epi32(codes[b], 4 * i);
                        __m512& to = sum[i % kTableChains][b];
                        to = _mm512_add_ps(to, _mm512_permutexvar_ps(pair, table));
                    }
                }
            }
            words += 2 * cloq::kLanes;
            tables += 256;
        }
        for (int b = 0; b < blocks; ++b) {
            const Vector scale = Vector::half(layer.block_scales(block + b) + group * cloq::kLanes);
            const Vector zero = Vector::bytes(layer.block_zeros(block + b) + group * cloq::kLanes) -
                                Vector::all(cloq::middle(2));
            const __m512 all =
                _mm512_fnmadd_ps(zero.v, _mm512_set1_ps(sums[group]), _mm512_add_ps(sum[0][b], sum[1][b]));
            total[b] = _mm512_fmadd_ps(scale.v, all, total[b]);
        }
    }
    for (int b = 0; b < blocks; ++b) _mm512_storeu_ps(y + b * cloq::kLanes, total[b]);
}

void multiply_by_table(const cloq::Layer& layer, int64_t block, int64_t blocks, const void* x, const float* sums,
                       float* y) {
    cloq::in_groups<2>(blocks, [&](auto count, int64_t first) {
        multiply_by_table_of<count()>(layer, block + first, static_cast<const float*>(x), sums, y + first * cloq::kLanes);
    });
}

// Several tokens. The tables of a slab of channels stay in the first-level cache while all blocks look up in them.
constexpr int kTableUnits = 2;

template <int width>
void multiply_tables(const cloq::OrderedWork& work) {
    constexpr int kSums = kTableChains * width;
    constexpr int64_t kPitch = cloq::kOrderedBlocks * cloq::kLanes;
    static_assert(kTableUnits * 16 * width * 16 <= cloq::kOrderedPanel);
    static_assert(cloq::kOrderedBlocks * kSums * cloq::kLanes <= cloq::kOrderedSums);
    const cloq::Layer& layer = *work.layer;
    const int64_t per_group = layer.units_per_group();
    float* tables = work.scratch;
    for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
        const float* x = work.x + chunk * layer.padded_in() * width;
        for (int64_t group = 0; group < layer.groups; ++group) {
            for (int64_t first = 0; first < per_group; first += kTableUnits) {
                const int64_t units = cloq::smaller(kTableUnits, per_group - first), unit = group * per_group + first;
                for (int64_t u = 0; u < units; ++u) {
                    pair_tables_of<width>(x + (unit + u) * cloq::kUnit * width, tables + u * 16 * width * 16);
                }
                const bool last = first + units == per_group;
                for (int64_t b = 0; b < work.blocks; ++b) {
                    const int64_t block = work.block + b;
                    const uint32_t* words = layer.block_words(block) + unit * 2 * cloq::kLanes;
                    // The next block's are a whole row away, further than a processor looks ahead by itself.
                    const uint32_t* next = words + layer.units() * 2 * cloq::kLanes;
                    float* waiting = work.scratch + cloq::kOrderedPanel + b * kSums * cloq::kLanes;
                    __m512 sum[kSums];
                    for (int i = 0; i < kSums; ++i) {
                        sum[i] = first == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(waiting + i * cloq::kLanes);
                    }
                    const float* table = tables;
                    for (int64_t half = 0; half < 2 * units; ++half) {
                        const __m512i codes = _mm512_loadu_si512(words + half * cloq::kLanes);
                        __builtin_prefetch(next + half * cloq::kLanes);
#pragma GCC unroll 8
                        for (int i = 0; i < 8; ++i) {
                            const __m512i pair = _mm512_srli_epi32(codes, 4 * i);
#pragma GCC unroll 8
                            for (int m = 0; m < width; ++m, table += 16) {
                                __m512& to = sum[i % kTableChains * width + m];
                                to = _mm512_add_ps(to, _mm512_permutexvar_ps(pair, _mm512_loadu_ps(table)));
                            }
                        }
                    }
                    if (!last) {
                        for (int i = 0; i < kSums; ++i) _mm512_storeu_ps(waiting + i * cloq::kLanes, sum[i]);
                        continue;
                    }
                    const Vector scale = Vector::half(layer.block_scales(block) + group * cloq::kLanes);
                    const Vector zero = Vector::bytes(layer.block_zeros(block) + group * cloq::kLanes) -
                                        Vector::all(cloq::middle(2));
                    const float* sums = work.sums + (chunk * layer.groups + group) * width;
                    for (int m = 0; m < width; ++m) {
                        float* y = work.y + (chunk * width + m) * kPitch + b * cloq::kLanes;
                        const __m512 all = _mm512_fnmadd_ps(zero.v, _mm512_set1_ps(sums[m]),
                                                            _mm512_add_ps(sum[m], sum[width + m]));
                        const __m512 before = group == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(y);
                        _mm512_storeu_ps(y, _mm512_fmadd_ps(scale.v, all, before));
                    }
                }
            }
        }
    }
}

template <int width>
struct TableBlocks {
    static constexpr int kWidth = width;
    static constexpr cloq::OrderedKernel run = multiply_tables<width>;
};

inline __mmask16 mask_of(int64_t count) {
    return static_cast<__mmask16>(count >= cloq::kLanes ? 0xffff : (1u << count) - 1);
}

void to_float(const void* from, int dtype, int64_t count, float* to) {
    for (int64_t k = 0; k < count; k += cloq::kLanes) {
        const __mmask16 mask = mask_of(count - k);
        _mm512_mask_storeu_ps(to + k, mask, load_row(from, dtype, k, mask));
    }
}

void from_float(const float* from, int dtype, int64_t count, void* to) {
    for (int64_t k = 0; k < count; k += cloq::kLanes) {
        const __mmask16 mask = mask_of(count - k);
        const __m512 value = _mm512_maskz_loadu_ps(mask, from + k);
        if (dtype == CLOQ_FLOAT32) {
            _mm512_mask_storeu_ps(static_cast<float*>(to) + k, mask, value);
            continue;
        }
        const __m256i half = dtype == CLOQ_FLOAT16 ? _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT) : to_bfloat(value);
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(to) + k, mask, half);
    }
}

float round_to_steps(float* row, int64_t count) {
    __m512 sizes = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int64_t k = 0; k < count; k += cloq::kLanes) {
        const __m512 value = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask_of(count - k), row + k));
        nan |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
        sizes = _mm512_max_ps(sizes, value);
    }
    float largest = _mm512_reduce_max_ps(sizes);
    if (nan != 0) largest = __builtin_nanf("");  // spreads over the token as it would in floats
    const float inverse = largest < cloq::kSmallest ? 0.0f : 127.0f / largest;
    for (int64_t k = 0; k < count; k += cloq::kLanes) {
        const __mmask16 mask = mask_of(count - k);
        const __m512 value = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, row + k), _mm512_set1_ps(inverse));
        _mm512_mask_storeu_ps(row + k, mask, _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT));
    }
    return largest < cloq::kSmallest ? 0.0f : largest / 127.0f;
}

template <int rows, int width>
void dots_of(const char* row, int64_t row_bytes, int dtype, int64_t length, const float* x, int64_t pitch, float* to,
             int64_t to_pitch) {
    __m512 sum[rows][width];
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < width; ++i) sum[r][i] = _mm512_setzero_ps();
    }
    for (int64_t k = 0; k < length; k += cloq::kLanes) {
        const __mmask16 mask = mask_of(length - k);
        __m512 here[rows];
        for (int r = 0; r < rows; ++r) here[r] = load_row(row + r * row_bytes, dtype, k, mask);
        for (int i = 0; i < width; ++i) {
            const __m512 activation = _mm512_maskz_loadu_ps(mask, x + i * pitch + k);
            for (int r = 0; r < rows; ++r) sum[r][i] = _mm512_fmadd_ps(here[r], activation, sum[r][i]);
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int i = 0; i < width; ++i) to[r * to_pitch + i] = _mm512_reduce_add_ps(sum[r][i]);
    }
}

template <int rows>
void dots_of_rows(const char* row, int64_t row_bytes, int dtype, int64_t length, const float* x, int64_t pitch,
                  int64_t count, float* to, int64_t to_pitch) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        dots_of<rows, 4>(row, row_bytes, dtype, length, x + i * pitch, pitch, to + i, to_pitch);
    }
    for (; i < count; ++i) dots_of<rows, 1>(row, row_bytes, dtype, length, x + i * pitch, pitch, to + i, to_pitch);
}

void dots(const void* a, int dtype, int64_t rows, int64_t length, const float* x, int64_t pitch, int64_t count, float* to,
          int64_t to_pitch) {
    const int64_t row_bytes = length * (dtype == CLOQ_FLOAT32 ? 4 : 2);
    const char* row = static_cast<const char*>(a);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        dots_of_rows<4>(row + r * row_bytes, row_bytes, dtype, length, x, pitch, count, to + r * to_pitch, to_pitch);
    }
    for (; r < rows; ++r) {
        dots_of_rows<1>(row + r * row_bytes, row_bytes, dtype, length, x, pitch, count, to + r * to_pitch, to_pitch);
    }
}

template <int width>
void add_low_rank_of(const void* b, int dtype, int64_t rank, const float* z, int64_t pitch, float* y, int64_t y_pitch) {
    // One token alone needs several sums side by side to hide the latency of the multiply-add, and then so do all: the
    // order of addition is the same for every width.
    constexpr int kChains = 4;
    __m512 sum[kChains][width];
    for (int i = 0; i < width; ++i) {
        for (int chain = 0; chain < kChains; ++chain) sum[chain][i] = _mm512_setzero_ps();
    }
    for (int64_t r = 0; r < rank; r += kChains) {
        for (int chain = 0; chain < kChains && r + chain < rank; ++chain) {
            const __m512 row = load_row(b, dtype, (r + chain) * cloq::kLanes, 0xffff);
            for (int i = 0; i < width; ++i) {
                sum[chain][i] = _mm512_fmadd_ps(row, _mm512_set1_ps(z[(r + chain) * pitch + i]), sum[chain][i]);
            }
        }
    }
    for (int i = 0; i < width; ++i) {
        for (int chain = 1; chain < kChains; ++chain) sum[0][i] = _mm512_add_ps(sum[0][i], sum[chain][i]);
        _mm512_storeu_ps(y + i * y_pitch, _mm512_add_ps(_mm512_loadu_ps(y + i * y_pitch), sum[0][i]));
    }
}

void add_low_rank(const void* b, int dtype, int64_t rank, const float* z, int64_t pitch, int64_t count, float* y,
                  int64_t y_pitch) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) add_low_rank_of<4>(b, dtype, rank, z + i, pitch, y + i * y_pitch, y_pitch);
    for (; i < count; ++i) add_low_rank_of<1>(b, dtype, rank, z + i, pitch, y + i * y_pitch, y_pitch);
}

}  // namespace

namespace cloq {

template <int bits>
static const LinearKernels* table() {
    using Fastest = KernelTable<Float32Block<bits, 4, 1>, Float32Block<bits, 2, 2>, Float32Block<bits, 2, 4>,
                                Float32Block<bits, 1, 8>, Float32Block<bits, 1, 12>>;
    // In the order of the tables' sums where there are tables.
    constexpr bool kPairs = bits == 2;
    using Chains = KernelTable<Float32Block<bits, 4, 1>, Float32Block<bits, 4, 2>, Float32Block<bits, 4, 4>>;
    using Pairs = KernelTable<Float32Block<bits, kTableChains, 1, 1, true>>;
    using OneOrder = std::conditional_t<kPairs, Pairs, Chains>;
    using Ordered = std::conditional_t<kPairs,
                                       TableOf<OrderedKernel, TableBlocks<2>, TableBlocks<4>, TableBlocks<6>, TableBlocks<8>>,
                                       TableOf<OrderedKernel, OrderedBlocks<bits, 4, 4>>>;
    using Int8 = KernelTable<Int8Block<bits, 1>, Int8Block<bits, 2>, Int8Block<bits, 4>, Int8Block<bits, 8>,
                             Int8Block<bits, 12>>;
    static constexpr LinearKernels kernels = {Fastest::kernels,
                                              OneOrder::kernels,
                                              Ordered::kernels,
                                              kPairs ? 2 : 5,
                                              Int8::kernels,
                                              bits == 2 ? pair_tables : nullptr,
                                              bits == 2 ? multiply_by_table : nullptr,
                                              decode_unit<bits>,
                                              multiply_panels<bits, 12, 2>,
                                              12,
                                              25,
                                              multiply_grad_panels<bits, 8, 2>,
                                              nullptr,
                                              0,
                                              nullptr,
                                              nullptr,
                                              nullptr};
    return &kernels;
}

const LinearKernels* linear_avx512(int bits) {
    switch (bits) {
        case 2: return table<2>();
        case 3: return table<3>();
        case 4: return table<4>();
        default: return table<8>();
    }
}

const RowKernels* rows_avx512() {
    static constexpr RowKernels kernels = {to_float, from_float, round_to_steps, dots, add_low_rank};
    return &kernels;
}

}  // namespace cloq
