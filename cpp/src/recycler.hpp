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
  struct Shelf;
  // A value that is out knows where it belongs, and keeps that place alive.
  struct Kept final : T {
    std::shared_ptr<Shelf> shelf;
  };
  struct Shelf {
    std::mutex mutex;  // a value may be let go on any thread, at any time
    std::vector<std::unique_ptr<Kept>> spare;
  };

 public:
  // Puts a value back. It has no size, so that a pointer is one word.
  struct Back {
    void operator()(T* value) const noexcept {
      std::unique_ptr<Kept> kept(static_cast<Kept*>(value));
      const std::shared_ptr<Shelf> shelf = std::move(kept->shelf);
      const std::lock_guard lock(shelf->mutex);
      if (shelf->spare.size() < shelf->spare.capacity()) shelf->spare.push_back(std::move(kept));
    }
  };
  using Pointer = std::unique_ptr<T, Back>;

  // Keeps at most `spare_max` that nobody has.
  explicit Recycler(std::size_t spare_max) : shelf_(std::make_shared<Shelf>()) {
    shelf_->spare.reserve(spare_max);
  }

  // One that was let go, as it was left; or a new one, once `prepare` has seen it.
  template <class Prepare>
  Pointer take(Prepare&& prepare) {
    std::unique_ptr<Kept> kept = spare();
    if (!kept) {
      kept = std::make_unique<Kept>();
      prepare(static_cast<T&>(*kept));
    }
    kept->shelf = shelf_;
    return Pointer(kept.release());
  }

 private:
  std::unique_ptr<Kept> spare() {
    const std::lock_guard lock(shelf_->mutex);
    if (shelf_->spare.empty()) return nullptr;
    auto kept = std::move(shelf_->spare.back());
    shelf_->spare.pop_back();
    return kept;
  }

  std::shared_ptr<Shelf> shelf_;
};

}  // namespace tokenspeed
