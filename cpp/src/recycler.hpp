// Values that are made once and used again. Rule: a value comes back only when whoever had it lets
// go of it; it keeps its memory, so that in the steady state nothing is allocated.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace tokenspeed {

template <class T>
class Recycler final {
  struct Shelf {
    std::mutex mutex;  // a value may be dropped on any thread, at any time
    std::vector<std::unique_ptr<T>> spare;
  };

 public:
  // Puts a value back; it holds the shelf, which so outlives whoever made it.
  class Back {
   public:
    Back() = default;
    void operator()(T* value) const noexcept {
      std::unique_ptr<T> owned(value);
      const std::lock_guard lock(shelf_->mutex);
      if (shelf_->spare.size() < shelf_->spare.capacity())
        shelf_->spare.push_back(std::move(owned));
    }

   private:
    friend class Recycler;
    explicit Back(std::shared_ptr<Shelf> shelf) noexcept : shelf_(std::move(shelf)) {}
    std::shared_ptr<Shelf> shelf_;
  };
  using Pointer = std::unique_ptr<T, Back>;

  // Keeps at most `spare_max` that nobody has.
  explicit Recycler(std::size_t spare_max) : shelf_(std::make_shared<Shelf>()) {
    shelf_->spare.reserve(spare_max);
  }

  // One that was let go, as it was left; else what `make` makes.
  template <class Make>
  Pointer take(Make&& make) {
    std::unique_ptr<T> value;
    {
      const std::lock_guard lock(shelf_->mutex);
      if (!shelf_->spare.empty()) {
        value = std::move(shelf_->spare.back());
        shelf_->spare.pop_back();
      }
    }
    if (!value) value = make();
    return Pointer(value.release(), Back(shelf_));
  }

 private:
  std::shared_ptr<Shelf> shelf_;
};

}  // namespace tokenspeed
