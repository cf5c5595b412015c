// The linear kernels without vector instructions of a particular set: the sixteen lanes are a loop.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "cloq_cpu.h"
#include "half.h"
#include "linear.h"

namespace {

struct Vector {
    float lane[cloq::kLanes];

    static constexpr int kSums = 4;
    static constexpr bool kDecodesOnce = false;  // one more kernel takes compilers minutes

    static Vector zero() { return all(0.0f); }
    static Vector all(float value) {
        Vector v;
        for (int n = 0; n < cloq::kLanes; ++n) v.lane[n] = value;
        return v;
    }
    static Vector load(const float* from) {
        Vector v;
        memcpy(v.lane, from, sizeof v.lane);
        return v;
    }
    static Vector half(const uint16_t* from) {
        Vector v;
        for (int n = 0; n < cloq::kLanes; ++n) v.lane[n] = float_of_half(from[n]);
        return v;
    }
    static Vector bytes(const uint8_t* from) {
        Vector v;
        for (int n = 0; n < cloq::kLanes; ++n) v.lane[n] = from[n];
        return v;
    }
    void store(float* to) const { memcpy(to, lane, sizeof lane); }
};

Vector operator+(const Vector& a, const Vector& b) {
    Vector v;
    for (int n = 0; n < cloq::kLanes; ++n) v.lane[n] = a.lane[n] + b.lane[n];
    return v;
}

Vector operator-(const Vector& a, const Vector& b) {
    Vector v;
    for (int n = 0; n < cloq::kLanes; ++n) v.lane[n] = a.lane[n] - b.lane[n];
    return v;
}

Vector operator*(const Vector& a, const Vector& b) {
    Vector v;
    for (int n = 0; n < cloq::kLanes; ++n) v.lane[n] = a.lane[n] * b.lane[n];
    return v;
}

Vector multiply_add(const Vector& a, const Vector& b, const Vector& c) {
    Vector v;
    for (int n = 0; n < cloq::kLanes; ++n) v.lane[n] = a.lane[n] * b.lane[n] + c.lane[n];
    return v;
}

Vector multiply_subtract(const Vector& a, const Vector& b, const Vector& c) {
    Vector v;
    for (int n = 0; n < cloq::kLanes; ++n) v.lane[n] = c.lane[n] - a.lane[n] * b.lane[n];
    return v;
}

template <int bits>
struct Codes {
    struct Words {
        uint32_t lane[cloq::kLanes];
    };

    void load(const uint32_t* words, Words* to) const {
        memcpy(to, words, bits * sizeof *to);
        if constexpr (bits == 3) {
            for (int n = 0; n < cloq::kLanes; ++n) {
                to[3].lane[n] = (to[0].lane[n] >> 6 & 0x03030303) | (to[1].lane[n] >> 4 & 0x0c0c0c0c) |
                                (to[2].lane[n] >> 2 & 0x30303030);
            }
        }
    }

    Vector centred(const Words& words, int byte, int slot) const {
        Vector v;
        for (int n = 0; n < cloq::kLanes; ++n) {
            const uint32_t code = words.lane[n] >> (8 * byte + bits * slot) & ((1u << bits) - 1);
            v.lane[n] = static_cast<float>(static_cast<int>(code) - cloq::middle(bits));
        }
        return v;
    }
};

void to_float(const void* from, int dtype, int64_t count, float* to) {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    if (dtype == CLOQ_FLOAT32) {
        memcpy(to, from, static_cast<size_t>(count) * sizeof *to);
    } else if (dtype == CLOQ_BFLOAT16) {
        for (int64_t i = 0; i < count; ++i) to[i] = float_of_bfloat(half[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) to[i] = float_of_half(half[i]);
    }
}

void from_float(const float* from, int dtype, int64_t count, void* to) {
    uint16_t* half = static_cast<uint16_t*>(to);
    if (dtype == CLOQ_FLOAT32) {
        memcpy(to, from, static_cast<size_t>(count) * sizeof *from);
    } else if (dtype == CLOQ_BFLOAT16) {
        for (int64_t i = 0; i < count; ++i) half[i] = bfloat_of_float(from[i]);
    } else {
        for (int64_t i = 0; i < count; ++i) half[i] = half_of_float(from[i]);
    }
}

float round_to_steps(float* row, int64_t count) {
    float largest = 0.0f;
    for (int64_t k = 0; k < count; ++k) {
        const float size = fabsf(row[k]);
        if (!(size <= largest)) largest = size;  // NaN is taken too, and spreads as it would in floats
    }
    if (largest < cloq::kSmallest) {
        for (int64_t k = 0; k < count; ++k) row[k] = 0.0f;
        return 0.0f;
    }
    const float inverse = 127.0f / largest;
    for (int64_t k = 0; k < count; ++k) row[k] = nearbyintf(row[k] * inverse);
    return largest / 127.0f;
}

constexpr int64_t kPiece = 256;

void dots(const void* a, int dtype, int64_t rows, int64_t length, const float* x, int64_t pitch, int64_t count, float* to,
          int64_t to_pitch) {
    const int64_t size = dtype == CLOQ_FLOAT32 ? 4 : 2;
    for (int64_t r = 0; r < rows; ++r, to += to_pitch) {
        for (int64_t i = 0; i < count; ++i) to[i] = 0.0f;
        for (int64_t k = 0; k < length; k += kPiece) {
            float piece[kPiece];
            const int64_t depth = cloq::smaller(kPiece, length - k);
            to_float(static_cast<const char*>(a) + (r * length + k) * size, dtype, depth, piece);
            for (int64_t i = 0; i < count; ++i) {
                float sum[8] = {0};
                const float* here = x + i * pitch + k;
                int64_t j = 0;
                for (; j + 8 <= depth; j += 8) {
                    for (int n = 0; n < 8; ++n) sum[n] += piece[j + n] * here[j + n];
                }
                for (; j < depth; ++j) sum[j % 8] += piece[j] * here[j];
                to[i] += ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
            }
        }
    }
}

void add_low_rank(const void* b, int dtype, int64_t rank, const float* z, int64_t pitch, int64_t count, float* y,
                  int64_t y_pitch) {
    constexpr int64_t kTogether = 8;
    const int64_t size = dtype == CLOQ_FLOAT32 ? 4 : 2;
    for (int64_t first = 0; first < count; first += kTogether) {
        const int64_t tokens = cloq::smaller(kTogether, count - first);
        float sums[kTogether][cloq::kLanes] = {};
        for (int64_t r = 0; r < rank; ++r) {
            float row[cloq::kLanes];
            to_float(static_cast<const char*>(b) + r * cloq::kLanes * size, dtype, cloq::kLanes, row);
            for (int64_t i = 0; i < tokens; ++i) {
                for (int n = 0; n < cloq::kLanes; ++n) sums[i][n] += z[r * pitch + first + i] * row[n];
            }
        }
        for (int64_t i = 0; i < tokens; ++i) {
            for (int n = 0; n < cloq::kLanes; ++n) y[(first + i) * y_pitch + n] += sums[i][n];
        }
    }
}

}  // namespace

#include "linear_fp32_table.h"

namespace cloq {

const LinearKernels* linear_scalar(int bits) { return float32_kernels(bits); }

const RowKernels* rows_scalar() { return float32_rows(); }

}  // namespace cloq
