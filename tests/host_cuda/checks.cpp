// Checks each access to memory: bounds, initialisation, and an order that does not hang on luck.
//
// Two accesses to an element, one of them a write, must be ordered: by a barrier of the block, by
// __syncwarp, or by being one thread's. Each thread knows for each lane of its warp the last
// __syncwarp of that lane that lies before it (a vector clock); so a missing barrier is found in
// whatever order the threads ran. Two blocks of a launch are ordered by
// fences and an atomic of global memory alone: what threads did, then fenced, then brought to a
// barrier lies before an atomic that a thread does after it; and after the block's next barrier lies
// what blocks had so published at that address, where the thread fenced in between.
#include <cstring>
#include <list>
#include <unordered_map>

#include "block.h"

namespace on_host {
namespace {

// The elements of global memory that the launch has touched: a hash table that is probed one place
// after another, in which whatever an earlier launch left counts as empty.
class GlobalElements {
 public:
  Element& at(const void* address) {
    if (2 * ++used_ > keys_.size()) grow();  // at most as many as that
    const size_t place = place_of(address);
    if (keys_[place].launch == launch_) {
      --used_;
    } else {
      keys_[place] = {address, launch_};
      elements_[place].clear();
    }
    return elements_[place];
  }
  void forget() { ++launch_, used_ = 0; }

 private:
  struct Key {
    const void* address = nullptr;
    uint64_t launch = 0;
  };
  size_t place_of(const void* address) const {
    const uint64_t mixed = reinterpret_cast<uintptr_t>(address) * 0x9E3779B97F4A7C15u;  // Fibonacci
    size_t place = mixed >> (64 - bits_);
    while (keys_[place].launch == launch_ && keys_[place].address != address) {
      place = (place + 1) & (keys_.size() - 1);
    }
    return place;
  }
  void grow() {
    const std::vector<Key> keys = std::move(keys_);
    const std::vector<Element> elements = std::move(elements_);
    keys_ = std::vector<Key>(size_t{1} << ++bits_);
    elements_ = std::vector<Element>(keys_.size());
    for (size_t i = 0; i < keys.size(); ++i) {
      const bool present = keys[i].launch == launch_;
      if (!present) {
        delete elements[i].others;
        continue;
      }
      const size_t place = place_of(keys[i].address);
      keys_[place] = keys[i], elements_[place] = elements[i];
    }
  }

  std::vector<Key> keys_;  // a power of two
  std::vector<Element> elements_;
  int bits_ = 11;
  uint64_t launch_ = 1;
  size_t used_ = 0;
};

GlobalElements global_elements;
std::unordered_map<const void*, std::list<Published>> published;
alignas(1024) unsigned char shared_memory[kMaxShared];
Element shared_elements[kMaxShared / kBytesOfElement];

// Whether another block's touch lies before what this one does now.
bool was_published(const Touch& touch) {
  auto block_of = block.before.upper_bound(touch.epoch);
  if (block_of == block.before.begin()) return false;
  const Published& other = *(--block_of)->second;
  return touch.epoch <= other.epoch && touch.fences < other.fences[touch.thread];
}

// The running thread does an atomic of global memory there.
void publish(const void* address) {
  Published now = {block.start, block.epoch, {}};
  for (const Thread& thread : block.threads) {
    const bool own = &thread == block.self;
    now.fences.push_back(own ? thread.fences : thread.fences_at_barrier);
  }
  published[address].push_back(std::move(now));
  block.met = address, block.met_by = block.self->number, block.met_fences = block.self->fences;
}

bool comes_before(const Touch& touch, uint64_t memory_start) {
  if (touch.epoch < memory_start) return true;
  if (touch.epoch < block.start) return was_published(touch);
  const auto thread = static_cast<int>(touch.thread);
  if (touch.epoch < block.epoch || thread == block.self->number) return true;
  return thread / kWarp == block.self->number / kWarp &&
         touch.time <= block.self->known[thread % kWarp];
}

const char* word(Access access) {
  if (access == Access::kAtomic) return "atomic";
  return access == Access::kRead ? "read" : "write";
}

std::string name_of(const Target& target) {
  return "index " + std::to_string(target.index) +
         (target.element == nullptr ? " of a Span of " : " of shared memory of ") +
         std::to_string(target.size);
}

[[noreturn]] void fail_race(Access access, const Target& target, Access before,
                            const Touch& earlier) {
  const std::string other = earlier.epoch < block.start ? std::string("a thread of another block")
                                                        : text_of(block.threads[earlier.thread]);
  fail(target.site, std::string(word(access)) + "-after-" + word(before) + " race: " +
                        word(access) + " of " + name_of(target) + " after the " + word(before) +
                        " by " + other + " at " + text(earlier.site()) + ", with no barrier between");
}

// What the running thread does now.
Touch touch_now(Site site) {
  return {block.epoch, site, block.self->number, block.self->time, block.self->fences};
}

bool is_of_now(const Touch& touch) {
  return touch.epoch == block.epoch && static_cast<int>(touch.thread) == block.self->number;
}

// Where only one block sees the memory, what lies before a barrier is of no more use.
void add_read(Element& element, Site site, bool one_block) {
  const Touch& last = element.read;
  if (one_block && last.epoch < block.epoch) {
    element.clear_reads();
  } else if (last.epoch != 0 && !is_of_now(last)) {
    element.more().reads.push_back(last);
  }
  element.read = touch_now(site);
}

void add_atomic(std::vector<Touch>& touches, Site site, bool one_block) {
  if (!touches.empty() && one_block && touches.back().epoch < block.epoch) {
    touches.clear();
  } else if (!touches.empty() && is_of_now(touches.back())) {
    touches.pop_back();
  }
  touches.push_back(touch_now(site));
}

void check_order(Access access, const Target& target, Element& element, uint64_t memory_start) {
  const auto check = [&](Access before, const Touch& touch) {
    if (!comes_before(touch, memory_start)) fail_race(access, target, before, touch);
  };
  check(Access::kWrite, element.write);
  if (element.others != nullptr) {
    if (access != Access::kRead) {
      for (const Touch& touch : element.others->reads) check(Access::kRead, touch);
    }
    if (access != Access::kAtomic) {
      for (const Touch& touch : element.others->atomics) check(Access::kAtomic, touch);
    }
  }
  if (access != Access::kRead) check(Access::kRead, element.read);
  const bool one_block = memory_start == block.start;
  if (access == Access::kRead) add_read(element, target.site, one_block);
  if (access == Access::kAtomic) add_atomic(element.more().atomics, target.site, one_block);
  if (access == Access::kWrite) {
    element.clear();  // whoever comes after the write comes after the others
    element.write = touch_now(target.site);
  }
}

void check_bounds(Access access, const Target& target, int64_t count) {
  if (target.index >= 0 && target.index + count <= target.size) return;
  const std::string width = count == 1 ? "" : std::to_string(count) + " elements from ";
  fail(target.site,
       std::string(word(access)) + " of " + width + name_of(target) + " is out of bounds");
}

void touch_one(Access access, const Target& target) {
  if (target.element != nullptr) {
    if (access != Access::kWrite && target.element->write.epoch < block.start) {
      fail(target.site, std::string(word(access)) + " of " + name_of(target) +
                            ", which no thread of the block has written yet");
    }
    check_order(access, target, *target.element, block.start);
    return;
  }
  const auto bytes = static_cast<int64_t>(target.bytes);
  if (access != Access::kWrite) block.counts->bytes_read += bytes;
  if (access != Access::kRead) block.counts->bytes_written += bytes;
  if (!target.constant) {
    check_order(access, target, global_elements.at(target.address), block.launch_start);
  }
  if (access == Access::kAtomic) publish(target.address);
}

}  // namespace

void touch(Access access, const Target& target) {
  check_bounds(access, target, 1);
  touch_one(access, target);
}

void touch_vector(Access access, Target target, int count, size_t align) {
  check_bounds(access, target, count);
  if (reinterpret_cast<uintptr_t>(target.address) % align != 0) {
    fail(target.site, std::string(word(access)) + " of a vector at " + name_of(target) +
                          ": the address is no multiple of " + std::to_string(align));
  }
  for (int i = 0; i < count; ++i) {
    touch_one(access, target);
    ++target.index;
    target.address = static_cast<const char*>(target.address) + target.bytes;
    if (target.element != nullptr) target.element += target.bytes / kBytesOfElement;
  }
}

Dynamic dynamic_shared(size_t offset, size_t bytes, size_t align, Site site) {
  if (offset + bytes > block.shared) {
    fail(site, "dynamic_shared: " + std::to_string(bytes) + " bytes from byte " +
                   std::to_string(offset) + " on, but the launch gave " +
                   std::to_string(block.shared));
  }
  if (offset % align != 0) {
    fail(site, "dynamic_shared: byte " + std::to_string(offset) + " is no multiple of " +
                   std::to_string(align));
  }
  return {shared_memory + offset, shared_elements + offset / kBytesOfElement};
}

void poison_dynamic_shared() {
  std::memset(shared_memory, 0xFF, block.shared);
}

void forget_global_memory() {
  global_elements.forget();
  published.clear();
}

void learn() {
  const bool fenced = block.met && block.threads[block.met_by].fences > block.met_fences;
  if (fenced) {
    for (const Published& other : published[block.met]) block.before[other.start] = &other;
  }
  block.met = nullptr;
}

}  // namespace on_host
