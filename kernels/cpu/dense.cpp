// Float layers in one order of addition: y = x W^T + bias, where a token's numbers depend on nothing but that token.
//
// What multiplies matrices fast picks its way by their sizes, and each way adds up in an order of its own.
#include "cloq_cpu.h"
#include "linear.h"
#include "threads.h"

namespace cloq {
namespace {

constexpr int64_t kRows = 16;    // outputs of a task
constexpr int64_t kTokens = 32;  // that are computed while its weights are near

struct Dense {
    const char* weight;
    int weight_dtype;
    int64_t out_features, in_features;
    const float* x;
    int64_t tokens;
    const float* bias;
    float* y;
    const RowKernels* rows;
};

void multiply_rows(void* context, int64_t task) {
    const Dense& work = *static_cast<Dense*>(context);
    const int64_t row = task * kRows, rows = smaller(kRows, work.out_features - row);
    const int64_t element = work.weight_dtype == CLOQ_FLOAT32 ? 4 : 2;
    const char* weight = work.weight + row * work.in_features * element;
    for (int64_t first = 0; first < work.tokens; first += kTokens) {
        const int64_t count = smaller(kTokens, work.tokens - first);
        float sums[kRows * kTokens];
        work.rows->dots(weight, work.weight_dtype, rows, work.in_features, work.x + first * work.in_features,
                        work.in_features, count, sums, kTokens);
        for (int64_t i = 0; i < count; ++i) {
            float* to = work.y + (first + i) * work.out_features + row;
            for (int64_t r = 0; r < rows; ++r) {
                to[r] = sums[r * kTokens + i] + (work.bias == nullptr ? 0.0f : work.bias[row + r]);
            }
        }
    }
}

}  // namespace
}  // namespace cloq

void cloq_dense_linear(const void* weight, int weight_dtype, int64_t out_features, int64_t in_features, const float* x,
                       int64_t tokens, const float* bias, float* y, int threads) {
    cloq::Dense work = {static_cast<const char*>(weight),
                        weight_dtype,
                        out_features,
                        in_features,
                        x,
                        tokens,
                        bias,
                        y,
                        cloq::row_kernels()};
    cloq::parallel_for(cloq::ceil_div(out_features, cloq::kRows), threads, cloq::multiply_rows, &work);
}
