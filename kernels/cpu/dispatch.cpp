// The one place that picks an instruction set, and the C interface in front of the kernels.
#include <string.h>

#include <atomic>

#include "cloq_cpu.h"
#include "kernels.h"
#include "linear.h"
#include "threads.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif
#if defined(CLOQ_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// In rising order within a family of processors; a build has code for one family alone.
enum Isa { kScalar, kAvx2, kAvx512, kAmx, kNeon, kIsaCount };

constexpr const char* kNames[kIsaCount] = {"scalar", "avx2", "avx512", "amx", "neon"};

bool is_built(int isa) {
    switch (isa) {
        case kScalar: return true;
#if defined(CLOQ_HAVE_AVX2)
        case kAvx2: return true;
#endif
#if defined(CLOQ_HAVE_AVX512)
        case kAvx512: return true;
#endif
#if defined(CLOQ_HAVE_AMX)
        case kAmx: return true;
#endif
#if defined(CLOQ_HAVE_NEON)
        case kNeon: return true;
#endif
        default: return false;
    }
}

struct Machine {
    bool runs[kIsaCount] = {true, false, false, false, false};
    // AMD before Zen 3 has the bit gather of BMI2 in microcode, tens of times slower than shifts and masks.
    bool fast_bit_gather = false;
};

#if defined(__x86_64__)
bool bit(unsigned value, int index) { return (value >> index & 1) != 0; }

#if defined(CLOQ_HAVE_AMX) && defined(__linux__)
// Linux grants the tile registers to a process that asks (ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA).
bool request_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
#else
bool request_tiles() { return false; }
#endif

Machine detect() {
    Machine machine;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return machine;  // no OSXSAVE: no wide registers
    const bool fma = bit(c, 12), f16c = bit(c, 29);
    const unsigned family = (a >> 8 & 0xf) + ((a >> 8 & 0xf) == 0xf ? (a >> 20 & 0xff) : 0);
    unsigned state_low, state_high;
    __asm__("xgetbv" : "=a"(state_low), "=d"(state_high) : "c"(0));
    unsigned vendor_b = 0, vendor_c = 0, vendor_d = 0;
    __get_cpuid(0, &a, &vendor_b, &vendor_c, &vendor_d);
    const bool amd = vendor_b == 0x68747541;  // "Auth"
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return machine;
    unsigned a1 = 0, b1, c1, d1;
    __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
    machine.fast_bit_gather = bit(b, 8) && !(amd && family < 0x19);
    machine.runs[kAvx2] = bit(b, 5) && bit(b, 8) && fma && f16c && (state_low & 0x6) == 0x6;
    // F, DQ, BW, VL, VBMI, VNNI and BF16: Sapphire Rapids and Zen 4 onward. Older ones run the AVX2 code.
    machine.runs[kAvx512] = machine.runs[kAvx2] && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 1) &&
                            bit(c, 11) && bit(a1, 5) && (state_low & 0xe6) == 0xe6;
    machine.runs[kAmx] = machine.runs[kAvx512] && bit(d, 22) && bit(d, 24) && bit(d, 25) &&
                         (state_low & 0x60000) == 0x60000 && request_tiles();
    return machine;
}
#else
Machine detect() {
    Machine machine;
#if defined(__aarch64__)
    machine.runs[kNeon] = true;  // part of the architecture
#endif
    return machine;
}
#endif

const Machine& machine() {
    static const Machine found = detect();
    return found;
}

bool is_runnable(int isa) { return is_built(isa) && machine().runs[isa]; }

int highest() {
    int best = kScalar;
    for (int isa = kScalar; isa < kIsaCount; ++isa) {
        if (is_runnable(isa)) best = isa;
    }
    return best;
}

std::atomic<int> selected{-1};

int active() {
    const int isa = selected.load(std::memory_order_relaxed);
    return isa >= 0 ? isa : highest();
}

struct Listing {
    char text[64] = {0};
    explicit Listing(bool (*include)(int)) {
        for (int isa = kScalar; isa < kIsaCount; ++isa) {
            if (!include(isa)) continue;
            if (text[0] != 0) strcat(text, ",");
            strcat(text, kNames[isa]);
        }
    }
};

const cloq::BitpackKernels* bitpack(int bits) {
#if defined(CLOQ_HAVE_AVX2)
    if (active() >= kAvx2 && machine().fast_bit_gather) return cloq::bitpack_avx2(bits);
#endif
    return cloq::bitpack_scalar(bits);
}

// Codes of one task: enough to outweigh waking a thread, few enough to balance uneven cores.
constexpr int64_t kCodesPerTask = int64_t{1} << 18;

using cloq::ceil_div;
using cloq::smaller;

struct BitpackWork {
    const cloq::BitpackKernels* kernels;
    uint8_t* codes;
    uint32_t* words;
    int64_t rows, columns, words_per_row;
    int bits;
    std::atomic<uint64_t> all{0};

    BitpackWork(int bits_, const uint8_t* codes_, int64_t rows_, int64_t columns_, int64_t words_per_row_,
                const uint32_t* words_)
        : kernels(bitpack(bits_)),
          codes(const_cast<uint8_t*>(codes_)),
          words(const_cast<uint32_t*>(words_)),
          rows(rows_),
          columns(columns_),
          words_per_row(words_per_row_),
          bits(bits_) {}

    bool too_large() const { return bits < 8 && (all.load() & ~(0x0101010101010101u * ((1u << bits) - 1))) != 0; }

    // Tasks over whole rows.
    int64_t rows_per_task() const { return columns > 0 && kCodesPerTask > columns ? kCodesPerTask / columns : 1; }
    int64_t row_tasks() const { return ceil_div(rows, rows_per_task()); }

    // Tasks over runs of kTilesPerTask tiles of one depth: neighbouring tiles write neighbouring pieces of a word row.
    static constexpr int64_t kTilesPerTask = kCodesPerTask / (cloq::kBitpackTileRows * cloq::kBitpackTileColumns);
    static constexpr int64_t kRowsPerTask = kTilesPerTask * cloq::kBitpackTileRows;
    int64_t tile_tasks() const { return ceil_div(rows, kRowsPerTask) * ceil_div(columns, cloq::kBitpackTileColumns); }

    // Calls each(codes, words, rows, columns) for the tiles of a task.
    template <class Each>
    void tiles(int64_t task, Each each) {
        const int64_t runs = ceil_div(rows, kRowsPerTask);
        const int64_t k = task / runs * cloq::kBitpackTileColumns;
        const int64_t depth = smaller(cloq::kBitpackTileColumns, columns - k);
        const int64_t last = smaller(rows, (task % runs + 1) * kRowsPerTask);
        for (int64_t row = task % runs * kRowsPerTask; row < last; row += cloq::kBitpackTileRows) {
            each(codes + row * columns + k, words + k * bits / 32 * rows + row,
                 smaller(cloq::kBitpackTileRows, last - row), depth);
        }
    }
};

void pack_rows_task(void* context, int64_t task) {
    BitpackWork& work = *static_cast<BitpackWork*>(context);
    const int64_t first = task * work.rows_per_task();
    work.all |= work.kernels->pack_rows(work.codes + first * work.columns,
                                        smaller(work.rows_per_task(), work.rows - first), work.columns,
                                        work.words_per_row, work.words + first * work.words_per_row);
}

void unpack_rows_task(void* context, int64_t task) {
    BitpackWork& work = *static_cast<BitpackWork*>(context);
    const int64_t first = task * work.rows_per_task();
    work.kernels->unpack_rows(work.words + first * work.words_per_row,
                              smaller(work.rows_per_task(), work.rows - first), work.words_per_row, work.columns,
                              work.codes + first * work.columns);
}

void pack_columns_task(void* context, int64_t task) {
    BitpackWork& work = *static_cast<BitpackWork*>(context);
    work.tiles(task, [&](uint8_t* codes, uint32_t* words, int64_t rows, int64_t depth) {
        work.all |= work.kernels->pack_tile(codes, work.columns, rows, depth, words, work.rows);
    });
}

void unpack_columns_task(void* context, int64_t task) {
    BitpackWork& work = *static_cast<BitpackWork*>(context);
    work.tiles(task, [&](uint8_t* codes, uint32_t* words, int64_t rows, int64_t depth) {
        work.kernels->unpack_tile(words, work.rows, rows, depth, codes, work.columns);
    });
}

}  // namespace

namespace cloq {

const LinearKernels* linear_kernels(int bits) {
    switch (active()) {
#if defined(CLOQ_HAVE_AMX)
        case kAmx: return linear_amx(bits);
#endif
#if defined(CLOQ_HAVE_AVX512)
        case kAvx512: return linear_avx512(bits);
#endif
#if defined(CLOQ_HAVE_AVX2)
        case kAvx2: return linear_avx2(bits);
#endif
#if defined(CLOQ_HAVE_NEON)
        case kNeon: return linear_neon(bits);
#endif
        default: return linear_scalar(bits);
    }
}

const RowKernels* row_kernels() {
#if defined(CLOQ_HAVE_AVX512)
    if (active() >= kAvx512) return rows_avx512();
#endif
#if defined(CLOQ_HAVE_AVX2)
    if (active() >= kAvx2) return rows_avx2();
#endif
#if defined(CLOQ_HAVE_NEON)
    if (active() == kNeon) return rows_neon();
#endif
    return rows_scalar();
}

}  // namespace cloq

int cloq_abi_version(void) { return CLOQ_ABI_VERSION; }

const char* cloq_built_isas(void) {
    static const Listing listing(is_built);
    return listing.text;
}

const char* cloq_runnable_isas(void) {
    static const Listing listing(is_runnable);
    return listing.text;
}

const char* cloq_isa(void) { return kNames[active()]; }

int cloq_select_isa(const char* name) {
    if (name[0] == 0) {
        selected = -1;
        return 0;
    }
    for (int isa = kScalar; isa < kIsaCount; ++isa) {
        if (strcmp(name, kNames[isa]) != 0) continue;
        if (!is_runnable(isa)) return 2;
        selected = isa;
        return 0;
    }
    return 1;
}

const char* cloq_threading(void) { return cloq::threading(); }

int cloq_pack_rows(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint32_t* words, int threads) {
    BitpackWork work(bits, codes, rows, columns, (columns * bits + 31) / 32, words);
    cloq::parallel_for(work.row_tasks(), threads, pack_rows_task, &work);
    return work.too_large() ? 1 : 0;
}

void cloq_unpack_rows(const uint32_t* words, int64_t rows, int64_t words_per_row, int64_t columns, int bits,
                      uint8_t* codes, int threads) {
    BitpackWork work(bits, codes, rows, columns, words_per_row, words);
    cloq::parallel_for(work.row_tasks(), threads, unpack_rows_task, &work);
}

int cloq_pack_columns(const uint8_t* codes, int64_t rows, int64_t columns, int bits, uint32_t* words, int threads) {
    BitpackWork work(bits, codes, rows, columns, 0, words);
    cloq::parallel_for(work.tile_tasks(), threads, pack_columns_task, &work);
    return work.too_large() ? 1 : 0;
}

void cloq_unpack_columns(const uint32_t* words, int64_t rows, int64_t columns, int bits, uint8_t* codes, int threads) {
    BitpackWork work(bits, codes, rows, columns, 0, words);
    cloq::parallel_for(work.tile_tasks(), threads, unpack_columns_task, &work);
}
