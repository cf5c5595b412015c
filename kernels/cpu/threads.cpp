// Two OpenMP runtimes in one process fight for the cores (each keeps its idle workers spinning) and may abort, so this
// library links none. If the process has one already, which is torch's own, its GOMP_parallel entry is borrowed: GNU,
// LLVM and Intel runtimes all export it, and its warm workers then serve torch's kernels and ours alike. Without one,
// a small pool of std::thread does the work.
#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace cloq {
namespace {

struct Work {
    int64_t tasks;
    void (*body)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};

    void run() {
        for (;;) {
            const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
            if (task >= tasks) return;
            body(context, task);
        }
    }
};

void run_work(void* work) { static_cast<Work*>(work)->run(); }

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_openmp() {
#if defined(_WIN32)
    return nullptr;
#else
    return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#endif
}

GompParallel openmp() {
    static const GompParallel found = find_openmp();
    return found;
}

// Workers sleep on a condition variable between calls. The pool is never destroyed: at exit its threads may be anywhere.
class Pool {
   public:
    // Returns false, having done nothing, while another thread's work is under way.
    bool run(Work& work, int threads) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner.owns_lock()) return false;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (static_cast<int>(count_) < threads - 1) {
                std::thread(&Pool::serve, this, count_++, generation_).detach();
            }
            work_ = &work;
            wanted_ = threads - 1;
            pending_ = threads - 1;
            ++generation_;
        }
        wake_.notify_all();
        work.run();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return pending_ == 0; });
        work_ = nullptr;
        return true;
    }

   private:
    void serve(int index, uint64_t seen) {
        for (;;) {
            Work* work;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_ != seen; });
                seen = generation_;
                if (index >= wanted_) continue;
                work = work_;
            }
            work->run();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--pending_ == 0) done_.notify_one();
        }
    }

    std::mutex owner_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable done_;
    int count_ = 0;
    int wanted_ = 0;
    int pending_ = 0;
    uint64_t generation_ = 0;
    Work* work_ = nullptr;
};

Pool* pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
#if !defined(_WIN32)
    // A forked child inherits the pool's memory but none of its threads: it gets a pool of its own.
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (current == nullptr || owner != getpid()) {
        current = new Pool;
        owner = getpid();
    }
#else
    std::lock_guard<std::mutex> lock(mutex);
    if (current == nullptr) current = new Pool;
#endif
    return current;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context) {
    if (tasks <= 0) return;
    Work work;
    work.tasks = tasks;
    work.body = body;
    work.context = context;
    if (threads <= 1 || tasks == 1) {
        work.run();
    } else if (openmp() != nullptr) {
        // The full team even for fewer tasks: a team of another size would be built anew.
        openmp()(run_work, &work, static_cast<unsigned>(threads), 0);
    } else if (!pool()->run(work, threads)) {
        work.run();
    }
}

const char* threading() { return openmp() != nullptr ? "the OpenMP runtime of the process" : "own threads"; }

}  // namespace cloq
