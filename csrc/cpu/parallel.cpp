#include "cpu/parallel.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace qemb::cpu {
namespace {

// One parallel region: threads take items from a shared counter.
struct Region {
    int64_t count;
    void (*run)(void*, int64_t);
    void* context;
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex error_mutex;

    void work() {
        try {
            for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) run(context, item);
        } catch (...) {
            std::lock_guard lock(error_mutex);
            if (!error) error = std::current_exception();
            next.store(count);
        }
    }
};

// A child of fork() has none of its parent's threads, so neither runtime may be used again there.
std::atomic<bool> g_forked{false};
// A worker that starts a region of its own runs it alone.
thread_local bool t_inside = false;

struct OpenMp {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    int (*max_threads)() = nullptr;

    OpenMp() {
        std::string path;
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* out) {
                auto& best = *static_cast<std::string*>(out);
                const std::string name = info->dlpi_name ? info->dlpi_name : "";
                if (name.find("libgomp") == std::string::npos) return 0;
                if (best.empty() || name.find("/torch") != std::string::npos) best = name;
                return 0;
            },
            &path);
        if (path.empty()) return;
        void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
        if (!library) return;
        max_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
        if (max_threads) parallel = reinterpret_cast<decltype(parallel)>(dlsym(library, "GOMP_parallel"));
    }
};

const OpenMp& open_mp() {
    static const OpenMp runtime;
    return runtime;
}

class Pool {
  public:
    explicit Pool(int threads) {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { serve(); });
    }
    ~Pool() {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    int size() const { return static_cast<int>(workers_.size()) + 1; }

    void run(Region& region) {
        std::lock_guard one_at_a_time(run_mutex_);
        {
            std::lock_guard lock(mutex_);
            region_ = &region;
            busy_ = static_cast<int>(workers_.size());
            ++generation_;
        }
        wake_.notify_all();
        t_inside = true;
        region.work();
        t_inside = false;
        std::unique_lock lock(mutex_);
        done_.wait(lock, [this] { return busy_ == 0; });
        region_ = nullptr;
    }

  private:
    void serve() {
        t_inside = true;
        uint64_t seen = 0;
        std::unique_lock lock(mutex_);
        while (true) {
            wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
            if (stop_) return;
            seen = generation_;
            Region* region = region_;
            lock.unlock();
            region->work();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::vector<std::thread> workers_;
    std::mutex mutex_, run_mutex_;
    std::condition_variable wake_, done_;
    Region* region_ = nullptr;
    uint64_t generation_ = 0;
    int busy_ = 0;
    bool stop_ = false;
};

std::mutex g_pool_mutex;
std::shared_ptr<Pool>& pool_slot() {
    static auto* slot = new std::shared_ptr<Pool>;  // never destroyed: static destructors must not join threads
    return *slot;
}

std::shared_ptr<Pool> own_pool(int threads = 0) {
    std::lock_guard lock(g_pool_mutex);
    auto& pool = pool_slot();
    if (threads > 0 && pool && pool->size() != threads) pool.reset();
    if (!pool) pool = std::make_shared<Pool>(threads > 0 ? threads : std::max(1u, std::thread::hardware_concurrency()));
    return pool;
}

// Registered once at load. The old pool is leaked on purpose: its threads do not exist in the child.
[[maybe_unused]] const int g_at_fork = pthread_atfork([] { g_pool_mutex.lock(); }, [] { g_pool_mutex.unlock(); },
                                                      [] {
                                                          g_forked = true;
                                                          new (&pool_slot()) std::shared_ptr<Pool>;
                                                          g_pool_mutex.unlock();
                                                      });

bool use_open_mp() { return open_mp().parallel && !g_forked; }

struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
};

}  // namespace

int num_threads() { return use_open_mp() ? open_mp().max_threads() : own_pool()->size(); }

void set_num_threads(int count) { own_pool(count); }

void run_parallel(int64_t count, void (*run)(void*, int64_t), void* context) {
    if (count <= 0) return;
    Region region{.count = count, .run = run, .context = context};
    const int threads = count == 1 || t_inside ? 1 : num_threads();
    if (threads == 1) {
        region.work();
    } else if (use_open_mp()) {
        open_mp().parallel([](void* region) { static_cast<Region*>(region)->work(); }, &region,
                           static_cast<unsigned>(std::min<int64_t>(threads, count)), 0);
    } else {
        own_pool()->run(region);
    }
    if (region.error) std::rethrow_exception(region.error);
}

void* scratch_bytes(Slot slot, size_t bytes) {
    thread_local Buffer buffers[static_cast<int>(Slot::kCount)];
    Buffer& buffer = buffers[static_cast<int>(slot)];
    if (buffer.size < bytes) {
        std::free(buffer.data);
        buffer.size = 0;
        const size_t rounded = (bytes + 63) / 64 * 64;
        buffer.data = std::aligned_alloc(64, rounded);
        if (!buffer.data) throw std::bad_alloc();
        buffer.size = rounded;
    }
    return buffer.data;
}

}  // namespace qemb::cpu
