// Every instruction set that this build runs, held against sums in double: a program by itself, so that it can be built
// for another family of processors and run under an emulator. Prints a line for each set; ends with 1 at any fault.
//
//     every_isa                          try everything
//     every_isa ISA BITS TOKENS TIMES    compute 64 outputs of 256 inputs, for an emulator that counts instructions
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>
#include <string>
#include <vector>

#include "cloq_cpu.h"
#include "half.h"

namespace {

std::mt19937 draw(7);
int faults = 0;

float normal() { return std::normal_distribution<float>(0.0f, 1.0f)(draw); }
int below(int end) { return std::uniform_int_distribution<int>(0, end - 1)(draw); }

// Numbers of a dtype, with what they are worth.
struct Numbers {
    std::vector<uint8_t> bytes;
    std::vector<double> values;

    Numbers(int64_t count, int dtype, float size) : bytes(count * (dtype == CLOQ_FLOAT32 ? 4 : 2)), values(count) {
        for (int64_t i = 0; i < count; ++i) {
            const float value = normal() * size;
            if (dtype == CLOQ_FLOAT32) {
                memcpy(&bytes[4 * i], &value, 4);
                values[i] = value;
                continue;
            }
            const uint16_t half = dtype == CLOQ_FLOAT16 ? half_of_float(value) : bfloat_of_float(value);
            memcpy(&bytes[2 * i], &half, 2);
            values[i] = dtype == CLOQ_FLOAT16 ? float_of_half(half) : float_of_bfloat(half);
        }
    }
};

double value_of(const std::vector<uint8_t>& bytes, int dtype, int64_t i) {
    if (dtype == CLOQ_FLOAT32) {
        float value;
        memcpy(&value, &bytes[4 * i], 4);
        return value;
    }
    uint16_t half;
    memcpy(&half, &bytes[2 * i], 2);
    return dtype == CLOQ_FLOAT16 ? float_of_half(half) : float_of_bfloat(half);
}

// One rounding of the dtype, and sums in float32 in any order.
double allowed(int dtype, double value, double size) {
    const double rounding = dtype == CLOQ_FLOAT32 ? 6e-8 : dtype == CLOQ_FLOAT16 ? 4.9e-4 : 3.91e-3;
    const double smallest = dtype == CLOQ_FLOAT16 ? 3e-8 : 0.0;  // half of the smallest step
    return rounding * fabs(value) + 2e-6 * size + smallest;
}

void check(const char* what, double found, double expected, double tolerance, int bits, int dtype, int64_t tokens) {
    if (fabs(found - expected) <= tolerance) return;  // NaN is a fault
    if (++faults <= 20) {
        printf("%s: %s, %d bits, dtype %d, %lld tokens: %.9g, expected %.9g within %.3g\n", cloq_isa(), what, bits, dtype,
               static_cast<long long>(tokens), found, expected, tolerance);
    }
}

struct Problem {
    int64_t out, in, groups, blocks, padded;
    int bits;
    std::vector<uint8_t> codes, zeros;
    std::vector<uint16_t> scales;
    std::vector<uint32_t> words;
    std::vector<double> q;
    cloq_weight weight;

    Problem(int64_t out_, int64_t in_, int64_t groups_, int bits_)
        : out(out_), in(in_), groups(groups_), blocks((out_ + 15) / 16), bits(bits_), codes(out_ * in_), q(out_ * in_) {
        const int64_t group = in / groups, units = (group + 31) / 32;
        zeros.assign(blocks * groups * 16, 0);
        scales.assign(blocks * groups * 16, 0);
        words.assign(blocks * groups * units * bits * 16, 0xdeadbeef);
        for (int64_t row = 0; row < out; ++row) {
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t at = (row / 16 * groups + g) * 16 + row % 16;
                scales[at] = half_of_float(0.01f + 0.01f * fabsf(normal()));
                zeros[at] = static_cast<uint8_t>(below((1 << bits) + 1 > 255 ? 255 : (1 << bits) + 1));
                for (int64_t k = g * group; k < (g + 1) * group; ++k) {
                    codes[row * in + k] = static_cast<uint8_t>(below(1 << bits));
                    q[row * in + k] = static_cast<double>(float_of_half(scales[at])) * (codes[row * in + k] - zeros[at]);
                }
            }
        }
        weight = {words.data(), scales.data(), zeros.data(), out, in, groups, bits};
        cloq_pack_weight(&weight, codes.data(), words.data(), 2);
    }
};

void try_codes(const Problem& problem) {
    std::vector<uint8_t> back(problem.codes.size(), 0xee);
    cloq_unpack_weight(&problem.weight, back.data(), 2);
    if (back != problem.codes && ++faults <= 20) printf("%s: codes of %d bits come back otherwise\n", cloq_isa(), problem.bits);
    const int64_t per_row = (problem.in * problem.bits + 31) / 32;
    std::vector<uint32_t> stream(problem.out * per_row, 0xdeadbeef);
    cloq_pack_rows(problem.codes.data(), problem.out, problem.in, problem.bits, stream.data(), 2);
    back.assign(back.size(), 0xee);
    cloq_unpack_rows(stream.data(), problem.out, per_row, problem.in, problem.bits, back.data(), 2);
    if (back != problem.codes && ++faults <= 20) printf("%s: rows of %d bits come back otherwise\n", cloq_isa(), problem.bits);
}

void try_dequantize(const Problem& problem, int dtype) {
    std::vector<uint8_t> q(problem.out * problem.in * (dtype == CLOQ_FLOAT32 ? 4 : 2), 0xff);
    cloq_dequantize(&problem.weight, 0, problem.out, dtype, q.data(), 2);
    for (int64_t i = 0; i < problem.out * problem.in; ++i) {
        check("dequantize", value_of(q, dtype, i), problem.q[i], allowed(dtype, problem.q[i], 0), problem.bits, dtype, 0);
    }
}

void try_linear(const Problem& problem, int dtype, int64_t tokens, bool adapted, int deterministic) {
    const int64_t in = problem.in, out = problem.out, rank = 5, adapters = 2;
    const Numbers x(tokens * in, dtype, 1.0f), a(adapters * rank * in, dtype, 0.1f);
    const Numbers b(adapters * problem.blocks * rank * 16, dtype, 0.1f);
    std::vector<float> bias(out), scaling = {2.0f, 0.5f};
    for (float& value : bias) value = normal();
    std::vector<int32_t> ranks = {5, 3}, ends = {static_cast<int32_t>(problem.blocks)}, index(tokens);
    for (int32_t& one : index) one = below(3) - 1;
    const cloq_lora lora = {a.bytes.data(), b.bytes.data(), scaling.data(), ranks.data(), ends.data(),
                            index.data(),   adapters,       1,              rank,         dtype};
    const int64_t width = dtype == CLOQ_FLOAT32 ? 4 : 2;
    std::vector<uint8_t> y(tokens * out * width, 0xff);
    cloq_linear(&problem.weight, x.bytes.data(), tokens, dtype, bias.data(), adapted ? &lora : nullptr, 0, deterministic,
                y.data(), 2);
    if (deterministic) {
        const int64_t last = tokens - 1;
        cloq_lora its = lora;
        its.index += last;
        std::vector<uint8_t> alone(out * width, 0xff);
        cloq_linear(&problem.weight, x.bytes.data() + last * in * width, 1, dtype, bias.data(), adapted ? &its : nullptr, 0,
                    1, alone.data(), 1);
        if (memcmp(alone.data(), y.data() + last * out * width, alone.size()) != 0 && ++faults <= 20) {
            printf("%s: a token alone has other bits than among %d, %d bits\n", cloq_isa(), int(tokens), problem.bits);
        }
    }
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t row = 0; row < out; ++row) {
            double sum = bias[row], size = fabs(bias[row]);
            for (int64_t k = 0; k < in; ++k) {
                sum += x.values[t * in + k] * problem.q[row * in + k];
                size += fabs(x.values[t * in + k] * problem.q[row * in + k]);
            }
            double term = 0, term_size = 0;
            if (adapted && index[t] >= 0) {
                for (int64_t r = 0; r < ranks[index[t]]; ++r) {
                    double z = 0;
                    for (int64_t k = 0; k < in; ++k) z += x.values[t * in + k] * a.values[(index[t] * rank + r) * in + k];
                    const int64_t at = ((index[t] * problem.blocks + row / 16) * rank + r) * 16 + row % 16;
                    term += scaling[index[t]] * b.values[at] * z;
                    term_size += fabs(scaling[index[t]] * b.values[at] * z);
                }
            }
            // A x may be rounded to the dtype on its way to B.
            const double rounded = dtype == CLOQ_FLOAT32 ? 2e-6 : 8e-3;
            check(adapted ? "linear with adapters" : "linear", value_of(y, dtype, t * out + row), sum + term,
                  allowed(dtype, sum + term, size) + rounded * term_size, problem.bits, dtype, tokens);
        }
    }
}

void try_gradient(const Problem& problem, int dtype, int64_t tokens) {
    const Numbers grad(tokens * problem.out, dtype, 1.0f);
    std::vector<uint8_t> x(tokens * problem.in * (dtype == CLOQ_FLOAT32 ? 4 : 2), 0xff);
    cloq_linear_input_grad(&problem.weight, grad.bytes.data(), tokens, dtype, x.data(), 2);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t k = 0; k < problem.in; ++k) {
            double sum = 0, size = 0;
            for (int64_t row = 0; row < problem.out; ++row) {
                const double product = grad.values[t * problem.out + row] * problem.q[row * problem.in + k];
                sum += product;
                size += fabs(product);
            }
            // Q may be rounded to the dtype.
            const double rounded = dtype == CLOQ_FLOAT32 ? 0.0 : 4e-3;
            check("gradient", value_of(x, dtype, t * problem.in + k), sum, allowed(dtype, sum, size) + rounded * size,
                  problem.bits, dtype, tokens);
        }
    }
}

}  // namespace

int main(int count, char** words) {
    if (count == 5) {
        if (cloq_select_isa(words[1]) != 0) return 2;
        const int64_t tokens = atoi(words[3]), inputs = 256, outputs = 64;
        const Problem problem(outputs, inputs, inputs / 64, atoi(words[2]));
        const std::vector<float> x(tokens * inputs, 1.0f);
        std::vector<float> y(tokens * outputs);
        for (int times = atoi(words[4]); times > 0; --times) {
            cloq_linear(&problem.weight, x.data(), tokens, CLOQ_FLOAT32, nullptr, nullptr, 0, 0, y.data(), 1);
        }
        return 0;
    }
    const std::string names = cloq_runnable_isas();
    for (size_t start = 0; start <= names.size();) {
        const size_t end = names.find(',', start) == std::string::npos ? names.size() : names.find(',', start);
        cloq_select_isa(names.substr(start, end - start).c_str());
        start = end + 1;
        for (int bits : {2, 3, 4, 8}) {
            for (const Problem& problem : {Problem(16, 64, 1, bits), Problem(37, 96, 2, bits), Problem(50, 160, 5, bits)}) {
                try_codes(problem);
                for (int dtype : {CLOQ_FLOAT32, CLOQ_BFLOAT16, CLOQ_FLOAT16}) {
                    try_dequantize(problem, dtype);
                    for (int64_t tokens : {1, 2, 3, 5, 9, 33}) {
                        for (int deterministic : {0, 1}) {
                            try_linear(problem, dtype, tokens, false, deterministic);
                            try_linear(problem, dtype, tokens, true, deterministic);
                        }
                        try_gradient(problem, dtype, tokens);
                    }
                }
            }
        }
        printf("%s: %d faults\n", cloq_isa(), faults);
    }
    return faults ? 1 : 0;
}
