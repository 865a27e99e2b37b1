// Memory for results on the CPU that is kept when a tensor dies and given to the next of its size:
// fresh pages cost as much as the kernels that fill them. In all it holds a quarter more than was in
// use at once.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#include "bindings.h"

namespace py = pybind11;

namespace rdarts {
namespace {

constexpr size_t kAlignment = 64;

class Store {
 public:
  // A block of `size` bytes or up to an eighth more; `size` becomes what it has.
  void* take(size_t& size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    size = (size + kAlignment - 1) / kAlignment * kAlignment;
    const auto found = free_.lower_bound(size);
    void* block = nullptr;
    if (found != free_.end() && found->first <= size + size / 8) {
      size = found->first, block = found->second;
      kept_ -= size;
      free_.erase(found);
    } else {
      const size_t limit = std::max(most_, used_ + size) / 4 * 5;
      while (!free_.empty() && used_ + size + kept_ > limit) drop(free_.begin());
      block = std::aligned_alloc(kAlignment, size);
      if (!block) throw std::bad_alloc();
    }
    used_ += size;
    most_ = std::max(most_, used_);
    return block;
  }

  void give(void* block, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= size;
    free_.emplace(size, block);
    kept_ += size;
  }

  // Returns what is kept to the system.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!free_.empty()) drop(free_.begin());
    most_ = used_;
  }

  size_t kept() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  void drop(std::multimap<size_t, void*>::iterator entry) {
    kept_ -= entry->first;
    std::free(entry->second);
    free_.erase(entry);
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
  size_t used_ = 0, kept_ = 0, most_ = 0;
};

// Never destroyed: tensors may outlive every destructor of the process.
Store& store() {
  static Store* const only = new Store;
  return *only;
}

// A block that a tensor is made of; it goes back when the last tensor on it dies.
class Block {
 public:
  explicit Block(size_t bytes) : size_(bytes), memory_(store().take(size_)) {}
  ~Block() { store().give(memory_, size_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  py::buffer_info buffer() const {
    return {memory_, 1, py::format_descriptor<unsigned char>::format(),
            static_cast<py::ssize_t>(size_)};
  }

 private:
  size_t size_;
  void* memory_;
};

}  // namespace

void define_memory(py::module_& module) {
  py::class_<Block>(module, "Block", py::buffer_protocol(), py::module_local(),
                    "Memory of at least so many bytes.")
      .def(py::init<size_t>(), py::arg("bytes"))
      .def_buffer(&Block::buffer);
  module.def("release_blocks", [] { store().release(); }, "Free the memory that no tensor uses.");
  module.def("kept_bytes", [] { return store().kept(); }, "Bytes that no tensor uses.");
}

}  // namespace rdarts
