// The float32 kernel of one block of sixteen output channels, over a vector type of sixteen lanes.
//
// Included by one translation unit per instruction set, which defines struct Vector with sixteen float lanes and
// struct Codes<bits> that turns a vector of words into centred codes (code - middle(bits)). Per sixteen weights the
// inner loop is one decoding and one multiply-add per token. Scales and zeros act once per group:
//   y += scale * (sum x * (code - middle) - (zero - middle) * sum x).
#pragma once

#include "linear.h"

namespace {

template <int bits, int width>
struct Float32Block {
    // One token alone needs several sums side by side to hide the latency of the multiply-add.
    static constexpr int kChains = width == 1 ? 4 : width == 2 ? 2 : 1;
    static constexpr int kWords = cloq::virtual_words(bits), kSlots = cloq::slots(bits);

    static void run(const cloq::Layer& layer, int64_t block, const void* activations, const float* sums, float* y) {
        const float* x = static_cast<const float*>(activations);
        const uint32_t* words = layer.block_words(block);
        const uint16_t* scales = layer.block_scales(block);
        const uint8_t* zeros = layer.block_zeros(block);
        const int64_t units = layer.units_per_group();
        const Codes<bits> codes;
        Vector total[width];
        for (int m = 0; m < width; ++m) total[m] = Vector::zero();
        for (int64_t group = 0; group < layer.groups; ++group) {
            Vector sum[width * kChains];
            for (int i = 0; i < width * kChains; ++i) sum[i] = Vector::zero();
            for (int64_t unit = 0; unit < units; ++unit) {
                typename Codes<bits>::Words unpacked[kWords];
                codes.load(words, unpacked);
#pragma GCC unroll 8
                for (int v = 0; v < kWords; ++v) {
#pragma GCC unroll 4
                    for (int byte = 0; byte < 4; ++byte) {
#pragma GCC unroll 4
                        for (int slot = 0; slot < kSlots; ++slot) {
                            const int pair = (v * 2 + byte % 2) * kSlots + slot;
                            const Vector weight = codes.centred(unpacked[v], byte, slot);
                            const float* here = x + (2 * pair + byte / 2) * width;
                            const int chain = kChains == 1 ? 0 : pair % kChains;
#pragma GCC unroll 12
                            for (int m = 0; m < width; ++m) {
                                sum[chain * width + m] = multiply_add(weight, Vector::all(here[m]), sum[chain * width + m]);
                            }
                        }
                    }
                }
                words += bits * cloq::kLanes;
                x += cloq::kUnit * width;
            }
            const Vector scale = Vector::half(scales + group * cloq::kLanes);
            const Vector zero = Vector::bytes(zeros + group * cloq::kLanes) - Vector::all(cloq::middle(bits));
            for (int m = 0; m < width; ++m) {
                Vector all = sum[m];
                for (int chain = 1; chain < kChains; ++chain) all = all + sum[chain * width + m];
                all = multiply_subtract(zero, Vector::all(sums[group * width + m]), all);
                total[m] = multiply_add(scale, all, total[m]);
            }
        }
        for (int m = 0; m < width; ++m) total[m].store(y + m * cloq::kLanes);
    }
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

template <int bits, int... widths>
struct Float32Table {
    static constexpr int kWidths[sizeof...(widths) + 1] = {widths..., 0};
    static constexpr cloq::BlockKernel kernels[] = {Float32Block<bits, widths>::run...};
};

}  // namespace
