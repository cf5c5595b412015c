// 16-bit floats without hardware conversions; rounding to nearest, ties to even.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

[[maybe_unused]] inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

[[maybe_unused]] inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

[[maybe_unused]] inline float float_of_bfloat(uint16_t value) { return float_of_bits(static_cast<uint32_t>(value) << 16); }

[[maybe_unused]] inline uint16_t bfloat_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN stays NaN
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

[[maybe_unused]] inline float float_of_half(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000) << 16;
    const uint32_t magnitude = value & 0x7fff;
    if (magnitude >= 0x7c00) return float_of_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // 2^112 moves the exponent from the bias of float16 to that of float32, subnormal numbers included.
    const float scaled = float_of_bits(magnitude << 13) * 5.192296858534828e33f;
    return float_of_bits(sign | bits_of_float(scaled));
}

[[maybe_unused]] inline uint16_t half_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
    if (magnitude < 0x38800000) {
        // Adding 0.5 leaves the rounded subnormal in the lowest bits of the sum.
        const uint32_t sum = bits_of_float(float_of_bits(magnitude) + 0.5f);
        return static_cast<uint16_t>(sign | (sum - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

}  // namespace
