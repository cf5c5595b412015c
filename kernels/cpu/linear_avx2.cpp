// The linear kernels on AVX2, FMA and F16C: the sixteen lanes are two vectors.
#include <immintrin.h>
#include <math.h>
#include <stdint.h>

#include "cloq_cpu.h"
#include "half.h"
#include "linear.h"

namespace {

struct Vector {
    __m256 low, high;

    static constexpr int kSums = 4;
    static constexpr bool kDecodesOnce = true;  // codes for several chunks of tokens

    static Vector zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Vector all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Vector load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
    static Vector half(const uint16_t* from) {
        const __m128i* at = reinterpret_cast<const __m128i*>(from);
        return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
    }
    static Vector bytes(const uint8_t* from) {
        const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(all)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)))};
    }
    void store(float* to) const {
        _mm256_storeu_ps(to, low);
        _mm256_storeu_ps(to + 8, high);
    }
};

inline Vector operator+(const Vector& a, const Vector& b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

inline Vector operator-(const Vector& a, const Vector& b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

inline Vector operator*(const Vector& a, const Vector& b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

inline Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

inline Vector multiply_subtract(const Vector& a, const Vector& b, const Vector& c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}

inline __m256i mask32(int value) { return _mm256_set1_epi32(value); }

// 2 and 3 bits: a permutation by the low three bits of a lane looks the code up, whatever stands above it. 4 and 8
// bits: the code is moved to the top of its lane and back with its sign, its highest bit having been flipped.
template <int bits>
struct Codes {
    struct Words {
        __m256i low, high;
    };

    const __m256 table = bits == 2 ? _mm256_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1) : _mm256_setr_ps(-4, -3, -2, -1, 0, 1, 2, 3);
    const __m256i flip = mask32(static_cast<int>(bits == 4 ? 0x88888888 : 0x80808080));

    static __m256i fourth(__m256i a, __m256i b, __m256i c) {
        return _mm256_or_si256(
            _mm256_and_si256(_mm256_srli_epi32(a, 6), mask32(0x03030303)),
            _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi32(b, 4), mask32(0x0c0c0c0c)),
                            _mm256_and_si256(_mm256_srli_epi32(c, 2), mask32(0x30303030))));
    }

    void load(const uint32_t* words, Words* to) const {
        const __m256i* at = reinterpret_cast<const __m256i*>(words);
        for (int v = 0; v < bits; ++v) {
            to[v].low = _mm256_loadu_si256(at + 2 * v);
            to[v].high = _mm256_loadu_si256(at + 2 * v + 1);
            if constexpr (bits >= 4) {
                to[v].low = _mm256_xor_si256(to[v].low, flip);
                to[v].high = _mm256_xor_si256(to[v].high, flip);
            }
        }
        if constexpr (bits == 3) {
            to[3].low = fourth(to[0].low, to[1].low, to[2].low);
            to[3].high = fourth(to[0].high, to[1].high, to[2].high);
        }
    }

    __m256 half(__m256i words, int byte, int slot) const {
        const int at = 8 * byte + bits * slot;
        if constexpr (bits < 4) {
            return _mm256_permutevar8x32_ps(table, _mm256_srli_epi32(words, at));
        } else {
            const __m256i top = _mm256_slli_epi32(words, 32 - bits - at);
            return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 32 - bits));
        }
    }

    Vector centred(const Words& words, int byte, int slot) const {
        return {half(words.low, byte, slot), half(words.high, byte, slot)};
    }
};

inline Vector load_row(const void* row, int dtype, int64_t k) {
    if (dtype == CLOQ_FLOAT32) {
        const float* at = static_cast<const float*>(row) + k;
        return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
    }
    const uint16_t* at = static_cast<const uint16_t*>(row) + k;
    if (dtype == CLOQ_FLOAT16) return Vector::half(at);
    const __m128i* pieces = reinterpret_cast<const __m128i*>(at);
    const auto widen = [](__m128i piece) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(piece), 16));
    };
    return {widen(_mm_loadu_si128(pieces)), widen(_mm_loadu_si128(pieces + 1))};
}

inline float tail_of(const void* row, int dtype, int64_t k) {
    if (dtype == CLOQ_FLOAT32) return static_cast<const float*>(row)[k];
    const uint16_t value = static_cast<const uint16_t*>(row)[k];
    return dtype == CLOQ_FLOAT16 ? _cvtsh_ss(value) : float_of_bfloat(value);
}

inline float sum_of(const Vector& v) {
    const __m256 all = _mm256_add_ps(v.low, v.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
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
    for (; k + 8 <= count; k += 8) {
        const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(from + k), _MM_FROUND_TO_NEAREST_INT);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(half + k), eight);
    }
    for (; k < count; ++k) half[k] = _cvtss_sh(from[k], _MM_FROUND_TO_NEAREST_INT);
}

#include "linear_rows.h"

}  // namespace

#include "linear_fp32_table.h"

namespace cloq {

const LinearKernels* linear_avx2(int bits) { return float32_kernels(bits); }

const RowKernels* rows_avx2() { return float32_rows(); }

}  // namespace cloq
