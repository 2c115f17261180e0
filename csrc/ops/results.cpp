// Memory of results, kept for the next ones: see results.h.

#include "ops/results.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>

#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyens {
namespace {

struct Block {
  void* data;
  size_t bytes;
  bool mapped;  // by the system for this block alone
};

constexpr size_t kMegabyte = size_t{1} << 20;
constexpr size_t kLeast = 64 << 10;  // below, the C library does as well
constexpr size_t kMostBlocks = 256;  // to look through
constexpr size_t kPage = 4096;
constexpr size_t kHugePagesFrom = 32 * kMegabyte;  // the C library has it mapped too

// Large ones are the system's, so that what is no longer kept leaves the process: in the C library's heap one kept block
// would hold all that is free below it.
Block get_block(size_t bytes) {
#if defined(__linux__)
  if (bytes >= kMegabyte) {
    void* const data =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data != MAP_FAILED) {
      constexpr uintptr_t kHuge = 2 << 20;
      if (bytes >= kHugePagesFrom) {
        const auto begin = reinterpret_cast<uintptr_t>(data);
        const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
        const uintptr_t end = (begin + bytes) / kHuge * kHuge;
        // Advice, which a system may not take.
        madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
      }
      return {data, bytes, true};
    }
  }
#endif
  return {c10::alloc_cpu(bytes), bytes, false};  // or says that there is no memory
}

void give_back(const Block& block) {
#if defined(__linux__)
  if (block.mapped) {
    munmap(block.data, block.bytes);
    return;
  }
#endif
  c10::free_cpu(block.data);
}

size_t most_kept() {
  const char* const given = std::getenv("PYENS_KEEP_MB");
  if (given == nullptr || *given == '\0') return 256 * kMegabyte;
  char* end = nullptr;
  const long long megabytes = std::strtoll(given, &end, 10);
  // A terabyte is more than any; beyond it the product would overflow.
  TORCH_CHECK_VALUE(*end == '\0' && megabytes >= 0 && megabytes <= (1 << 20),
                    "PYENS_KEEP_MB: expected a number of megabytes from 0 to ", 1 << 20, ", got \"",
                    given, "\"");
  return static_cast<size_t>(megabytes) * kMegabyte;
}

// The blocks of results that there are, and of freed ones. Nodes move from list to list: what frees memory takes none.
class Blocks {
 public:
  // Of others the C library takes care.
  bool takes(size_t bytes) const {
    return (bytes >= kLeast && bytes <= most_) || bytes >= kHugePagesFrom;
  }

  void* take(size_t bytes) {
    std::list<Block> taken;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (auto block = kept_.begin(); block != kept_.end(); ++block) {
        // An eighth more at most: a batch that is a little smaller.
        if (block->bytes < bytes || block->bytes - bytes > bytes / 8) continue;
        total_ -= block->bytes;
        taken.splice(taken.end(), kept_, block);
        break;
      }
    }
    // Whole pages, so that sizes which differ by less are the same.
    if (taken.empty()) taken.push_back(get((bytes + kPage - 1) / kPage * kPage));
    const Block block = taken.front();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      used_.emplace(block.data, taken.begin());
      live_.splice(live_.end(), taken);
    }
    c10::profiledCPUMemoryReporter().New(block.data, block.bytes);
    return block.data;
  }

  void give(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    std::list<Block> old;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = used_.find(data);
      const auto block = found->second;
      used_.erase(found);
      if (block->bytes > most_) {
        old.splice(old.end(), live_, block);
      } else {
        total_ += block->bytes;
        kept_.splice(kept_.begin(), live_, block);
      }
      while (total_ > most_ || kept_.size() > kMostBlocks) {
        total_ -= kept_.back().bytes;
        old.splice(old.end(), kept_, std::prev(kept_.end()));
      }
    }
    for (const Block& each : old) give_back(each);
  }

  // What it gave back to the system, in bytes.
  size_t release() {
    std::list<Block> old;
    size_t bytes = 0;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      old.swap(kept_);
      std::swap(bytes, total_);
    }
    for (const Block& block : old) give_back(block);
    return bytes;
  }

  // Never destroyed: tensors may outlive all that a process destroys at its end.
  static Blocks& all() {
    static auto* const blocks = make();
    return *blocks;
  }

 private:
  static Blocks* make() {
    auto* const blocks = new Blocks;
#if !defined(_WIN32)
    // A child whose parent forked while another thread was here would wait for that thread for ever.
    pthread_atfork([] { all().mutex_.lock(); }, [] { all().mutex_.unlock(); },
                   [] { all().mutex_.unlock(); });
#endif
    return blocks;
  }

  Block get(size_t bytes) {
    try {
      return get_block(bytes);
    } catch (const c10::Error&) {
      if (release() == 0) throw;
      return get_block(bytes);
    }
  }

  std::mutex mutex_;
  std::list<Block> live_, kept_;  // the last ones that were freed first
  std::unordered_map<void*, std::list<Block>::iterator> used_;
  size_t total_ = 0;  // of the kept ones
  const size_t most_ = most_kept();
};

class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (!Blocks::all().takes(bytes)) return c10::GetCPUAllocator()->allocate(bytes);
    void* const data = Blocks::all().take(bytes);
    return {data, data, [](void* given) { Blocks::all().give(given); },
            c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    default_copy_data(to, from, count);
  }
};

}  // namespace

int64_t release_memory() { return static_cast<int64_t>(Blocks::all().release()); }

c10::Allocator* result_allocator() {
  static auto* const allocator = new ResultAllocator;
  return allocator;
}

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (!options.device().is_cpu()) return at::empty(sizes, options);
  constexpr c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  return at::detail::empty_generic(sizes, result_allocator(), cpu,
                                   c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

at::Tensor empty_result_symint(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  const auto numbers = c10::asIntArrayRefSlowOpt(sizes);
  return numbers ? empty_result(*numbers, options) : at::empty_symint(sizes, options);
}

}  // namespace pyens
