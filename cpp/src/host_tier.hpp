// A second home for cached pages: pages of host memory, and the copies to and fro. Rule: what a
// copy reads or writes is not given away before the copy is acknowledged, on the device and on the
// host; and a copy ends after the copy of the page above it, in vain if that page did not come.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "prefix_index.hpp"
#include "tokenspeed/pages.hpp"

namespace tokenspeed {

class HostTier final {
 public:
  HostTier(PrefixIndex& index, PagePool& pool, HostPage pages);
  HostTier(const HostTier&) = delete;
  HostTier& operator=(const HostTier&) = delete;

  // --- the actions of specs/HostTier.tla, less the guards that look at requests
  bool store_start(PageId page, HostPage to);
  bool store_end(HostPage to, bool good);
  bool load_start(HostPage from, PageId page);
  bool load_end(HostPage from, bool good);
  bool drop(HostPage page);

  // Remembers what became of a copy, to be applied by `store_end` or `load_end` when it is its
  // turn. False if no such copy waits for it: it never was, or this was told before.
  bool acknowledge(std::int64_t ticket, bool good);
  // What is under way will have been in vain.
  void forsake();
  // Gives every page back, when all ends.
  void drain();

  // --- looking
  enum class Kind : std::uint8_t { Free, Storing, Present, Loading };
  enum class Ack : std::uint8_t { None, Good, Bad };
  struct Page {
    Kind kind = Kind::Free;
    Ack ack = Ack::None;    // of the copy under way
    bool forsaken = false;  // that copy will have been in vain
    NodeId node = -1;
    std::int64_t ticket = -1;            // of its last copy
    PageId copied = -1;                  // the device page that a copy reads or writes
    std::optional<ExclusivePage> taken;  // the same, while it is written
    std::optional<ExclusivePage> own;    // this page, while it is not free
  };
  const Page& operator[](HostPage page) const noexcept { return pages_[index(page)]; }
  HostPage total() const noexcept { return static_cast<HostPage>(pages_.size()); }
  HostPage free() const noexcept { return free_.free(); }
  HostPage present() const noexcept { return present_; }
  HostPage loading() const noexcept { return loading_; }
  // Copies under way, in the order of their start: by the host page of each.
  const std::vector<HostPage>& moving() const noexcept { return moving_; }
  // A free page; or none.
  std::optional<HostPage> next() const noexcept { return free_.next(); }
  // The least recently used page that could be dropped.
  std::optional<HostPage> oldest();
  // Could this device page be stored, had the host a page for it?
  bool storable(PageId page) const noexcept;
  // A node and the host pages below it, the deepest first.
  std::vector<HostPage> below(NodeId node) const;

 private:
  static std::size_t index(HostPage page) noexcept { return static_cast<std::size_t>(page); }
  bool waits(const Page& page) const noexcept;
  bool above_is_home(NodeId node) const noexcept;
  void begin(HostPage at, PageId copied);
  void end(HostPage at);
  void free_again(HostPage page);

  // A binary heap of the pages that could be dropped, the least recently used first. What it is
  // ordered by is brought up to date when a page comes to the front: a use only makes it later.
  bool earlier(HostPage a, HostPage b) const noexcept;
  void put(std::size_t place, HostPage page) noexcept;
  void sift(std::size_t place) noexcept;
  void settle(HostPage page);

  PrefixIndex& index_;
  PagePool& pool_;
  HostPage present_ = 0;  // Present or Loading
  HostPage loading_ = 0;
  std::int64_t copies_ = 0;
  std::vector<Page> pages_;
  PagePool free_;
  std::vector<HostPage> moving_;
  std::vector<HostPage> heap_;
  std::vector<std::int32_t> places_;  // in the heap, or -1
  std::vector<std::uint64_t> used_;
};

std::string_view name(HostTier::Kind kind) noexcept;

}  // namespace tokenspeed
