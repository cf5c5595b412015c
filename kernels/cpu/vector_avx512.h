// Sixteen lanes as one AVX-512 vector; included by the translation units of AVX-512 and AMX.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "cloq_cpu.h"
#include "linear.h"

namespace {

struct Vector {
    __m512 v;

    static constexpr int kSums = 4;

    static Vector zero() { return {_mm512_setzero_ps()}; }
    static Vector all(float value) { return {_mm512_set1_ps(value)}; }
    static Vector load(const float* from) { return {_mm512_loadu_ps(from)}; }
    static Vector half(const uint16_t* from) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
    }
    static Vector bytes(const uint8_t* from) {
        return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
    }
    void store(float* to) const { _mm512_storeu_ps(to, v); }
};

inline Vector operator+(const Vector& a, const Vector& b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector operator-(const Vector& a, const Vector& b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector operator*(const Vector& a, const Vector& b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
}
inline Vector multiply_subtract(const Vector& a, const Vector& b, const Vector& c) {
    return {_mm512_fnmadd_ps(a.v, b.v, c.v)};
}

// Up to 4 bits, a permutation by the low four bits of a lane looks the code up, whatever stands above it: the table
// repeats. At 8 bits the code is moved to the top of its lane and back with its sign, its highest bit flipped.
template <int bits>
struct Codes {
    using Words = __m512i;

    static __m512 repeated() {
        float values[16];
        for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i % (1 << bits) - cloq::middle(bits));
        return _mm512_loadu_ps(values);
    }

    const __m512 table = repeated();

    void load_plain(const uint32_t* words, __m512i* to) const {
        for (int v = 0; v < bits; ++v) to[v] = _mm512_loadu_si512(words + v * cloq::kLanes);
        if constexpr (bits == 3) {
            // Bit selection: 0xca is a ? b : c.
            const __m512i low = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x03030303), _mm512_srli_epi32(to[0], 6),
                                                          _mm512_srli_epi32(to[1], 4), 0xca);
            to[3] = _mm512_ternarylogic_epi32(_mm512_set1_epi32(0x0f0f0f0f), low, _mm512_srli_epi32(to[2], 2), 0xca);
        }
    }

    void load(const uint32_t* words, __m512i* to) const {
        load_plain(words, to);
        if constexpr (bits == 8) {
            for (int v = 0; v < bits; ++v) to[v] = _mm512_xor_si512(to[v], _mm512_set1_epi8(static_cast<char>(0x80)));
        }
    }

    Vector centred(__m512i words, int byte, int slot) const {
        if constexpr (bits == 8) {
            return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 24 - 8 * byte), 24))};
        } else {
            return {_mm512_permutexvar_ps(_mm512_srli_epi32(words, 8 * byte + bits * slot), table)};
        }
    }
};

// Sixteen numbers of a row of any dtype; what the mask leaves out is not read.
inline __m512 load_row(const void* row, int dtype, int64_t k, __mmask16 mask) {
    if (dtype == CLOQ_FLOAT32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(row) + k);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(row) + k);
    if (dtype == CLOQ_FLOAT16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Nearest bfloat16, ties to even. The instruction for it flushes subnormal numbers, torch does not.
inline __m256i to_bfloat(__m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

// The centred codes in bfloat16, repeated over 32 lanes; they need at most four significant bits.
template <int bits>
inline __m512i bfloat16_table() {
    uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
        const float value = static_cast<float>(i % (1 << bits) - cloq::middle(bits));
        uint32_t pattern;
        __builtin_memcpy(&pattern, &value, 4);
        values[i] = static_cast<uint16_t>(pattern >> 16);
    }
    return _mm512_loadu_si512(values);
}

}  // namespace
