// The linear kernels on NEON, as every 64-bit Arm machine has it: the sixteen lanes are four vectors.
#include <arm_neon.h>
#include <math.h>
#include <stdint.h>

#include "cloq_cpu.h"
#include "half.h"
#include "linear.h"

namespace {

constexpr int kParts = 4;  // vectors of four lanes

struct Vector {
    float32x4_t part[kParts];

    // Its four parts are sums side by side already, and more of them would leave the registers.
    static constexpr int kSums = 1;
    static constexpr bool kDecodesOnce = true;  // codes for several chunks of tokens

    static Vector zero() { return all(0.0f); }
    static Vector all(float value) {
        const float32x4_t same = vdupq_n_f32(value);
        return {{same, same, same, same}};
    }
    static Vector load(const float* from) {
        return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
    }
    static Vector half(const uint16_t* from) {
        Vector v;
        for (int i = 0; i < kParts; ++i) v.part[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + 4 * i)));
        return v;
    }
    static Vector bfloat(const uint16_t* from) {
        Vector v;
        for (int i = 0; i < kParts; ++i) v.part[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(from + 4 * i), 16));
        return v;
    }
    static Vector bytes(const uint8_t* from) {
        const uint8x16_t all = vld1q_u8(from);
        const uint16x8_t low = vmovl_u8(vget_low_u8(all)), high = vmovl_u8(vget_high_u8(all));
        return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
                 vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
    }
    void store(float* to) const {
        for (int i = 0; i < kParts; ++i) vst1q_f32(to + 4 * i, part[i]);
    }
};

inline Vector operator+(const Vector& a, const Vector& b) {
    Vector v;
    for (int i = 0; i < kParts; ++i) v.part[i] = vaddq_f32(a.part[i], b.part[i]);
    return v;
}

inline Vector operator-(const Vector& a, const Vector& b) {
    Vector v;
    for (int i = 0; i < kParts; ++i) v.part[i] = vsubq_f32(a.part[i], b.part[i]);
    return v;
}

inline Vector operator*(const Vector& a, const Vector& b) {
    Vector v;
    for (int i = 0; i < kParts; ++i) v.part[i] = vmulq_f32(a.part[i], b.part[i]);
    return v;
}

inline Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
    Vector v;
    for (int i = 0; i < kParts; ++i) v.part[i] = vfmaq_f32(c.part[i], a.part[i], b.part[i]);
    return v;
}

inline Vector multiply_subtract(const Vector& a, const Vector& b, const Vector& c) {
    Vector v;
    for (int i = 0; i < kParts; ++i) v.part[i] = vfmsq_f32(c.part[i], a.part[i], b.part[i]);
    return v;
}

inline uint32x4_t mask32(uint32_t value) { return vdupq_n_u32(value); }

// A code is moved to the top of its lane and back with its sign, its highest bit having been flipped. What stood above
// it in the lane is shifted out.
template <int bits>
struct Codes {
    struct Words {
        uint32x4_t part[kParts];
    };

    const uint32x4_t flip = mask32(bits == 2   ? 0xaaaaaaaa
                                   : bits == 3 ? 0x24242424
                                   : bits == 4 ? 0x88888888
                                               : 0x80808080);

    static uint32x4_t fourth(uint32x4_t a, uint32x4_t b, uint32x4_t c) {
        return vorrq_u32(vandq_u32(vshrq_n_u32(a, 6), mask32(0x03030303)),
                         vorrq_u32(vandq_u32(vshrq_n_u32(b, 4), mask32(0x0c0c0c0c)),
                                   vandq_u32(vshrq_n_u32(c, 2), mask32(0x30303030))));
    }

    void load(const uint32_t* words, Words* to) const {
        for (int i = 0; i < kParts; ++i) {
            for (int v = 0; v < bits; ++v) to[v].part[i] = vld1q_u32(words + v * cloq::kLanes + 4 * i);
            if constexpr (bits == 3) to[3].part[i] = fourth(to[0].part[i], to[1].part[i], to[2].part[i]);
            for (int v = 0; v < cloq::virtual_words(bits); ++v) to[v].part[i] = veorq_u32(to[v].part[i], flip);
        }
    }

    Vector centred(const Words& words, int byte, int slot) const {
        const int32x4_t up = vdupq_n_s32(32 - bits - (8 * byte + bits * slot)), down = vdupq_n_s32(bits - 32);
        Vector v;
        for (int i = 0; i < kParts; ++i) {
            const int32x4_t top = vreinterpretq_s32_u32(vshlq_u32(words.part[i], up));
            v.part[i] = vcvtq_f32_s32(vshlq_s32(top, down));  // a negative count shifts to the right
        }
        return v;
    }
};

inline Vector load_row(const void* row, int dtype, int64_t k) {
    if (dtype == CLOQ_FLOAT32) return Vector::load(static_cast<const float*>(row) + k);
    const uint16_t* at = static_cast<const uint16_t*>(row) + k;
    return dtype == CLOQ_FLOAT16 ? Vector::half(at) : Vector::bfloat(at);
}

inline float tail_of(const void* row, int dtype, int64_t k) {
    if (dtype == CLOQ_FLOAT32) return static_cast<const float*>(row)[k];
    const uint16_t value = static_cast<const uint16_t*>(row)[k];
    return dtype == CLOQ_FLOAT16 ? float_of_half(value) : float_of_bfloat(value);
}

inline float sum_of(const Vector& v) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(v.part[0], v.part[1]), vaddq_f32(v.part[2], v.part[3])));
}

void to_float(const void* from, int dtype, int64_t count, float* to) {
    int64_t k = 0;
    for (; k + cloq::kLanes <= count; k += cloq::kLanes) load_row(from, dtype, k).store(to + k);
    for (; k < count; ++k) to[k] = tail_of(from, dtype, k);
}

void from_float(const float* from, int dtype, int64_t count, void* to) {
    if (dtype == CLOQ_FLOAT32) {
        for (int64_t k = 0; k < count; ++k) static_cast<float*>(to)[k] = from[k];
        return;
    }
    uint16_t* half = static_cast<uint16_t*>(to);
    if (dtype == CLOQ_BFLOAT16) {
        for (int64_t k = 0; k < count; ++k) half[k] = bfloat_of_float(from[k]);
        return;
    }
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) vst1_u16(half + k, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + k))));
    for (; k < count; ++k) half[k] = half_of_float(from[k]);
}

#include "linear_rows.h"

}  // namespace

#include "linear_fp32_table.h"

namespace cloq {

const LinearKernels* linear_neon(int bits) { return float32_kernels(bits); }

const RowKernels* rows_neon() { return float32_rows(); }

}  // namespace cloq
