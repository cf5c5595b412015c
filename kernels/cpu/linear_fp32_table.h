// The tables of an instruction set that has the float32 kernels and no others.
//
// Included by one translation unit per instruction set behind its Vector, Codes and row kernels, as linear_fp32.h is.
#pragma once

#include <type_traits>

#include "linear_fp32.h"

namespace {

template <int bits>
const cloq::LinearKernels* float32_table() {
    constexpr int kSums = Vector::kSums, kHalf = (kSums + 1) / 2;
    using Wide = Float32Block<bits, 1, 4>;
    using Fastest = cloq::KernelTable<Float32Block<bits, kSums, 1>, Float32Block<bits, kHalf, 2>, Wide>;
    using OneOrder = cloq::KernelTable<Float32Block<bits, 1, 1, kHalf>, Float32Block<bits, 1, 2, kHalf>, Wide>;
    using Ordered = std::conditional_t<Vector::kDecodesOnce, cloq::TableOf<cloq::OrderedKernel, OrderedBlocks<bits, 1, 4>>,
                                       cloq::NoKernels<cloq::OrderedKernel>>;
    static constexpr cloq::LinearKernels kernels = {Fastest::kernels,
                                                    OneOrder::kernels,
                                                    Ordered::kernels,
                                                    5,
                                                    {},
                                                    nullptr,
                                                    nullptr,
                                                    decode_unit<bits>,
                                                    multiply_panels<bits, 4, 1>,
                                                    4,
                                                    9,
                                                    multiply_grad_panels<bits, 4, 1>,
                                                    nullptr,
                                                    0,
                                                    nullptr,
                                                    nullptr,
                                                    nullptr};
    return &kernels;
}

const cloq::LinearKernels* float32_kernels(int bits) {
    switch (bits) {
        case 2: return float32_table<2>();
        case 3: return float32_table<3>();
        case 4: return float32_table<4>();
        default: return float32_table<8>();
    }
}

const cloq::RowKernels* float32_rows() {
    static constexpr cloq::RowKernels kernels = {to_float, from_float, round_to_steps, dots, add_low_rank};
    return &kernels;
}

}  // namespace
