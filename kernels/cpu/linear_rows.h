// The row kernels over a vector type of sixteen lanes: dot products, low-rank terms, activations of 8 bits.
//
// Included inside the anonymous namespace of one translation unit per instruction set, which defines struct Vector,
// load_row and tail_of (one vector or one number of a row of any cloq_dtype), and sum_of (the sum of the lanes).
#pragma once

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

template <int width>
void dots_of(const void* row, int dtype, int64_t length, const float* x, int64_t pitch, float* to) {
    Vector sum[width];
    for (int i = 0; i < width; ++i) sum[i] = Vector::zero();
    int64_t k = 0;
    for (; k + cloq::kLanes <= length; k += cloq::kLanes) {
        const Vector here = load_row(row, dtype, k);
        for (int i = 0; i < width; ++i) sum[i] = multiply_add(here, Vector::load(x + i * pitch + k), sum[i]);
    }
    for (int i = 0; i < width; ++i) to[i] = sum_of(sum[i]);
    for (; k < length; ++k) {
        for (int i = 0; i < width; ++i) to[i] += tail_of(row, dtype, k) * x[i * pitch + k];
    }
}

void dots(const void* a, int dtype, int64_t rows, int64_t length, const float* x, int64_t pitch, int64_t count, float* to,
          int64_t to_pitch) {
    const int64_t row_bytes = length * (dtype == CLOQ_FLOAT32 ? 4 : 2);
    for (int64_t r = 0; r < rows; ++r, to += to_pitch) {
        const char* row = static_cast<const char*>(a) + r * row_bytes;
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) dots_of<4>(row, dtype, length, x + i * pitch, pitch, to + i);
        for (; i < count; ++i) dots_of<1>(row, dtype, length, x + i * pitch, pitch, to + i);
    }
}

void add_low_rank(const void* b, int dtype, int64_t rank, const float* z, int64_t pitch, int64_t count, float* y,
                  int64_t y_pitch) {
    for (int64_t i = 0; i < count; ++i, ++z, y += y_pitch) {
        Vector sum = Vector::zero();
        for (int64_t r = 0; r < rank; ++r) {
            sum = multiply_add(load_row(b, dtype, r * cloq::kLanes), Vector::all(z[r * pitch]), sum);
        }
        (Vector::load(y) + sum).store(y);
    }
}
