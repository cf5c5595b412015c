// The float32 kernel of one block of sixteen output channels, over a vector type of sixteen lanes.
//
// Included by one translation unit per instruction set, which defines struct Vector with sixteen float lanes and
// struct Codes<bits> that turns a vector of words into centred codes (code - middle(bits)). Per sixteen weights the
// inner loop is one decoding and one multiply-add per token. Scales and zeros act once per group:
//   y += scale * (sum x * (code - middle) - (zero - middle) * sum x).
#pragma once

#include "linear.h"

namespace {

// An output is `chains` sums side by side, which hide the latency of the multiply-add, and so are `together` blocks. Two
// kernels with as many chains give a token the same bits. `pairs` adds up two channels first, as tables of pairs do.
template <int bits, int chains, int width, int together = 1, bool pairs = false>
struct Float32Block {
    static constexpr int kWidth = width;
    static constexpr int kWords = cloq::virtual_words(bits), kSlots = cloq::slots(bits);

    static void run(const cloq::Layer& layer, int64_t block, int64_t blocks, const void* x, const float* sums, float* y) {
        cloq::in_groups<together>(blocks, [&](auto count, int64_t first) {
            run_together<count()>(layer, block + first, static_cast<const float*>(x), sums, y + first * cloq::kLanes);
        });
    }

    template <int blocks>
    static void run_together(const cloq::Layer& layer, int64_t block, const float* x, const float* sums, float* y) {
        constexpr int kSums = blocks * width;
        const uint32_t* words = layer.block_words(block);
        const int64_t units = layer.units_per_group(), block_words = layer.units() * bits * cloq::kLanes;
        const Codes<bits> codes;
        Vector total[kSums];
        for (int i = 0; i < kSums; ++i) total[i] = Vector::zero();
        for (int64_t group = 0; group < layer.groups; ++group) {
            Vector sum[kSums * chains];
            for (int i = 0; i < kSums * chains; ++i) sum[i] = Vector::zero();
            for (int64_t unit = 0; unit < units; ++unit) {
                typename Codes<bits>::Words unpacked[blocks][kWords];
                for (int b = 0; b < blocks; ++b) codes.load(words + b * block_words, unpacked[b]);
#pragma GCC unroll 8
                for (int v = 0; v < kWords; ++v) {
#pragma GCC unroll 4
                    for (int byte = 0; byte < 4; ++byte) {
#pragma GCC unroll 4
                        for (int slot = 0; slot < kSlots; slot += pairs ? 2 : 1) {
                            const int pair = (v * 2 + byte % 2) * kSlots + slot;
                            const float* here = x + (2 * pair + byte / 2) * width;
                            const int chain = (pairs ? pair / 2 : pair) % chains;
#pragma GCC unroll 2
                            for (int b = 0; b < blocks; ++b) {
                                const Vector weight = codes.centred(unpacked[b][v], byte, slot);
#pragma GCC unroll 12
                                for (int m = 0; m < width; ++m) {
                                    Vector& to = sum[chain * kSums + b * width + m];
                                    if constexpr (pairs) {
                                        const Vector next = codes.centred(unpacked[b][v], byte, slot + 1);
                                        const Vector second = next * Vector::all(here[2 * width + m]);
                                        to = to + multiply_add(weight, Vector::all(here[m]), second);
                                    } else {
                                        to = multiply_add(weight, Vector::all(here[m]), to);
                                    }
                                }
                            }
                        }
                    }
                }
                words += bits * cloq::kLanes;
                x += cloq::kUnit * width;
            }
            for (int b = 0; b < blocks; ++b) {
                const Vector scale = Vector::half(layer.block_scales(block + b) + group * cloq::kLanes);
                const Vector zero = Vector::bytes(layer.block_zeros(block + b) + group * cloq::kLanes) -
                                    Vector::all(cloq::middle(bits));
                for (int m = 0; m < width; ++m) {
                    const int i = b * width + m;
                    Vector all = sum[i];
                    for (int chain = 1; chain < chains; ++chain) all = all + sum[chain * kSums + i];
                    all = multiply_subtract(zero, Vector::all(sums[group * width + m]), all);
                    total[i] = multiply_add(scale, all, total[i]);
                }
            }
        }
        for (int b = 0; b < blocks; ++b) {
            for (int m = 0; m < width; ++m) total[b * width + m].store(y + m * cloq::kBlockPitch + b * cloq::kLanes);
        }
    }
};

// Centred codes of a unit in the order of its words, bytes and slots.
template <int bits>
inline void decode_centred(const Codes<bits>& codes, const uint32_t* words, float* to) {
    constexpr int kWords = cloq::virtual_words(bits), kSlots = cloq::slots(bits);
    typename Codes<bits>::Words unpacked[kWords];
    codes.load(words, unpacked);
#pragma GCC unroll 8
    for (int v = 0; v < kWords; ++v) {
#pragma GCC unroll 4
        for (int byte = 0; byte < 4; ++byte) {
#pragma GCC unroll 4
            for (int slot = 0; slot < kSlots; ++slot, to += cloq::kLanes) {
                codes.centred(unpacked[v], byte, slot).store(to);
            }
        }
    }
}

// The same sums, of codes that are decoded once for all chunks of tokens.
template <int bits, int chains, int width>
void multiply_ordered(const cloq::OrderedWork& work) {
    constexpr int kWords = cloq::virtual_words(bits), kSlots = cloq::slots(bits), kSums = chains * width;
    constexpr int64_t kPitch = cloq::kOrderedBlocks * cloq::kLanes, kEntries = cloq::kUnit * cloq::kLanes;
    constexpr int64_t kUnits = cloq::kOrderedPanel / kEntries;
    static_assert(cloq::kOrderedChunks * kSums * cloq::kLanes <= cloq::kOrderedSums);
    const cloq::Layer& layer = *work.layer;
    const int64_t per_group = layer.units_per_group();
    const Codes<bits> codes;
    for (int64_t b = 0; b < work.blocks; ++b) {
        const uint32_t* words = layer.block_words(work.block + b);
        for (int64_t group = 0; group < layer.groups; ++group) {
            const Vector scale = Vector::half(layer.block_scales(work.block + b) + group * cloq::kLanes);
            const Vector zero = Vector::bytes(layer.block_zeros(work.block + b) + group * cloq::kLanes) -
                                Vector::all(cloq::middle(bits));
            for (int64_t first = 0; first < per_group; first += kUnits) {
                const int64_t units = cloq::smaller(kUnits, per_group - first);
                for (int64_t u = 0; u < units; ++u, words += bits * cloq::kLanes) {
                    decode_centred<bits>(codes, words, work.scratch + u * kEntries);
                }
                const bool last = first + units == per_group;
                for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
                    const float* x = work.x + (chunk * layer.padded_in() + (group * per_group + first) * cloq::kUnit) * width;
                    const float* panel = work.scratch;
                    float* waiting = work.scratch + cloq::kOrderedPanel + chunk * kSums * cloq::kLanes;
                    Vector sum[kSums];
                    for (int i = 0; i < kSums; ++i) {
                        sum[i] = first == 0 ? Vector::zero() : Vector::load(waiting + i * cloq::kLanes);
                    }
                    for (int64_t u = 0; u < units; ++u, x += cloq::kUnit * width) {
#pragma GCC unroll 8
                        for (int v = 0; v < kWords; ++v) {
#pragma GCC unroll 4
                            for (int byte = 0; byte < 4; ++byte) {
#pragma GCC unroll 4
                                for (int slot = 0; slot < kSlots; ++slot, panel += cloq::kLanes) {
                                    const int pair = (v * 2 + byte % 2) * kSlots + slot;
                                    const float* here = x + (2 * pair + byte / 2) * width;
                                    const Vector weight = Vector::load(panel);
#pragma GCC unroll 12
                                    for (int m = 0; m < width; ++m) {
                                        Vector& to = sum[pair % chains * width + m];
                                        to = multiply_add(weight, Vector::all(here[m]), to);
                                    }
                                }
                            }
                        }
                    }
                    if (!last) {
                        for (int i = 0; i < kSums; ++i) sum[i].store(waiting + i * cloq::kLanes);
                        continue;
                    }
                    const float* sums = work.sums + (chunk * layer.groups + group) * width;
                    for (int m = 0; m < width; ++m) {
                        float* y = work.y + (chunk * width + m) * kPitch + b * cloq::kLanes;
                        Vector all = sum[m];
                        for (int chain = 1; chain < chains; ++chain) all = all + sum[chain * width + m];
                        all = multiply_subtract(zero, Vector::all(sums[m]), all);
                        multiply_add(scale, all, group == 0 ? Vector::zero() : Vector::load(y)).store(y);
                    }
                }
            }
        }
    }
}

template <int bits, int chains, int width>
struct OrderedBlocks {
    static constexpr int kWidth = width;
    static constexpr cloq::OrderedKernel run = multiply_ordered<bits, chains, width>;
};

template <int bits>
void decode_unit(const cloq::Layer& layer, int64_t block, int64_t unit, float* q) {
    constexpr int kWords = cloq::virtual_words(bits), kSlots = cloq::slots(bits);
    const Codes<bits> codes;
    typename Codes<bits>::Words unpacked[kWords];
    codes.load(layer.block_words(block) + unit * bits * cloq::kLanes, unpacked);
    const int64_t group = unit / layer.units_per_group();
    const Vector scale = Vector::half(layer.block_scales(block) + group * cloq::kLanes);
    const Vector zero =
        Vector::bytes(layer.block_zeros(block) + group * cloq::kLanes) - Vector::all(cloq::middle(bits));
    for (int v = 0; v < kWords; ++v) {
        for (int byte = 0; byte < 4; ++byte) {
            for (int slot = 0; slot < kSlots; ++slot) {
                const int pair = (v * 2 + byte % 2) * kSlots + slot;
                const Vector centred = codes.centred(unpacked[v], byte, slot);
                ((centred - zero) * scale).store(q + (2 * pair + byte / 2) * cloq::kLanes);
            }
        }
    }
}

// c[i, j] += (or =) sum_k a[i, k] b[k, j] for `rows` rows and `vectors` vectors of columns, in steps of sixteen k.
// a[i, k] lies at i * a_row + k * a_column within a step; the vectors of b are b_vector apart, their rows sixteen.
// The sums of one call start at zero, so that rounding errors of a long sum do not pile up.
template <int rows, int vectors, int64_t a_row, int64_t a_column>
inline void multiply_panel(const float* a, int64_t a_step, const float* b, int64_t b_vector, int64_t steps, bool first,
                           float* c, int64_t c_pitch) {
    constexpr bool kFetch = a_row == 1;
    Vector sum[rows * vectors];
    for (int i = 0; i < rows * vectors; ++i) sum[i] = Vector::zero();
    for (int64_t step = 0; step < steps; ++step) {
        if (kFetch) {  // what follows a, and comes from far away the first time
            for (int64_t line = 0; line < a_step; line += 16) __builtin_prefetch(a + steps * a_step + line, 0, 2);
        }
#pragma GCC unroll 4
        for (int k = 0; k < cloq::kLanes; ++k) {
            Vector column[vectors];
            for (int j = 0; j < vectors; ++j) column[j] = Vector::load(b + j * b_vector + k * cloq::kLanes);
#pragma GCC unroll 12
            for (int i = 0; i < rows; ++i) {
                const Vector entry = Vector::all(a[i * a_row + k * a_column]);
#pragma GCC unroll 2
                for (int j = 0; j < vectors; ++j) {
                    sum[i * vectors + j] = multiply_add(entry, column[j], sum[i * vectors + j]);
                }
            }
        }
        a += a_step;
        b += cloq::kLanes * cloq::kLanes;
    }
    for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < vectors; ++j) {
            float* to = c + i * c_pitch + j * cloq::kLanes;
            (first ? sum[i * vectors + j] : Vector::load(to) + sum[i * vectors + j]).store(to);
        }
    }
}

template <int bits, int width, int vectors>
void multiply_panels(const cloq::PanelWork& work) {
    const cloq::Layer& layer = *work.layer;
    constexpr int64_t kBlock = cloq::kPanelUnits * cloq::kUnit * cloq::kLanes;  // of the panel
    constexpr int64_t kPitch = cloq::kPanelBlocks * cloq::kLanes;
    for (int64_t unit = 0; unit < layer.units(); unit += cloq::kPanelUnits) {
        const int64_t units = cloq::smaller(cloq::kPanelUnits, layer.units() - unit);
        for (int64_t block = 0; block < work.blocks; ++block) {
            for (int64_t u = 0; u < units; ++u) {
                decode_unit<bits>(layer, work.block + block, unit + u,
                                  work.panel + block * kBlock + u * cloq::kUnit * cloq::kLanes);
            }
        }
        // A pair of blocks stays in the first-level cache while the activations pass.
        for (int64_t block = 0; block < work.blocks;) {
            const bool wide = block + vectors <= work.blocks;
            for (int64_t chunk = 0; chunk < work.chunks; ++chunk) {
                (wide ? multiply_panel<width, vectors, 1, width> : multiply_panel<width, 1, 1, width>)(
                    work.x + (unit * work.chunks + chunk * units) * cloq::kUnit * width, cloq::kLanes * width,
                    work.panel + block * kBlock, kBlock, units * 2, unit == 0,
                    work.y + chunk * width * kPitch + block * cloq::kLanes, kPitch);
            }
            block += wide ? vectors : 1;
        }
    }
}

template <int bits, int rows, int vectors>
void multiply_grad_panels(const cloq::GradWork& work) {
    const cloq::Layer& layer = *work.layer;
    const int64_t blocks = layer.blocks(), channels = work.units * cloq::kUnit, pitch = work.token_tiles * cloq::kLanes;
    const float* grad = static_cast<const float*>(work.grad);
    float* panel = static_cast<float*>(work.panel);  // (blocks, channels, 16 output channels)
    for (int64_t block = 0; block < blocks; block += cloq::kGradBlocks) {
        const int64_t count = cloq::smaller(cloq::kGradBlocks, blocks - block);
        for (int64_t b = 0; b < count; ++b) {
            for (int64_t u = 0; u < work.units; ++u) {
                decode_unit<bits>(layer, block + b, work.unit + u, panel + (b * channels + u * cloq::kUnit) * cloq::kLanes);
            }
        }
        constexpr int64_t kBlock = cloq::kLanes * cloq::kLanes;  // of the gradients
        for (int64_t tile = 0; tile < work.token_tiles;) {
            const bool wide = tile + vectors <= work.token_tiles;
            const float* b = grad + (tile * blocks + block) * kBlock;
            for (int64_t channel = 0; channel < channels; channel += rows) {
                const float* a = panel + channel * cloq::kLanes;
                (wide ? multiply_panel<rows, vectors, cloq::kLanes, 1> : multiply_panel<rows, 1, cloq::kLanes, 1>)(
                    a, channels * cloq::kLanes, b, blocks * kBlock, count, block == 0,
                    work.y + channel * pitch + tile * cloq::kLanes, pitch);
            }
            tile += wide ? vectors : 1;
        }
    }
}

}  // namespace
