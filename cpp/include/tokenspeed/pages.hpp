// KV pages by what may be done with them. Rule: a page is in exactly one place: the pool's free
// list, one request's table as exclusive (it may be written), or the prefix index as shared (it may
// not).
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

namespace tokenspeed {

using PageId = std::int32_t;
using NodeId = std::int32_t;

namespace detail {

// A move-only number that must be handed on, never dropped.
template <class Tag>
class Unique {
 public:
  constexpr explicit Unique(std::int32_t value) noexcept : value_(value) {}
  constexpr Unique(Unique&& other) noexcept : value_(std::exchange(other.value_, kNone)) {}
  constexpr Unique& operator=(Unique&& other) noexcept {
    assert(value_ == kNone && "a held page was overwritten");
    value_ = std::exchange(other.value_, kNone);
    return *this;
  }
  Unique(const Unique&) = delete;
  Unique& operator=(const Unique&) = delete;
  ~Unique() { assert(value_ == kNone && "a held page was dropped"); }

  constexpr std::int32_t get() const noexcept {
    assert(value_ != kNone);
    return value_;
  }
  constexpr std::int32_t release() noexcept { return std::exchange(value_, kNone); }

 private:
  static constexpr std::int32_t kNone = -1;
  std::int32_t value_;
};

}  // namespace detail

// A page that one request alone holds and may write.
class ExclusivePage final {
 public:
  constexpr PageId id() const noexcept { return id_.get(); }

 private:
  friend class PagePool;
  friend class PrefixIndex;
  constexpr explicit ExclusivePage(PageId id) noexcept : id_(id) {}
  detail::Unique<ExclusivePage> id_;
};

// One reference to a page of the prefix index; read only.
class SharedPage final {
 public:
  constexpr PageId id() const noexcept { return page_; }
  constexpr NodeId node() const noexcept { return node_.get(); }

 private:
  friend class PrefixIndex;
  constexpr SharedPage(NodeId node, PageId page) noexcept : node_(node), page_(page) {}
  detail::Unique<SharedPage> node_;
  PageId page_;
};

// Pages that nobody holds.
class PagePool final {
 public:
  explicit PagePool(PageId pages) {
    free_.reserve(static_cast<std::size_t>(pages));
    for (PageId id = pages; id-- > 0;) free_.push_back(id);
    for (PageId id = pages; id-- > 0;) places_.push_back(id);
  }
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  PageId total() const noexcept { return static_cast<PageId>(places_.size()); }
  PageId free() const noexcept { return static_cast<PageId>(free_.size()); }
  const std::vector<PageId>& free_ids() const noexcept { return free_; }

  // The page that was given back last: its memory is the warmest.
  std::optional<PageId> next() const noexcept {
    return free_.empty() ? std::nullopt : std::optional(free_.back());
  }
  // This page; nothing if it is not free.
  std::optional<ExclusivePage> take(PageId id) noexcept {
    if (id < 0 || id >= total() || place(id) < 0) return std::nullopt;
    free_[static_cast<std::size_t>(place(id))] = free_.back();
    place(free_.back()) = place(id);
    free_.pop_back();
    place(id) = -1;
    return ExclusivePage(id);
  }
  void give_back(ExclusivePage&& page) noexcept {
    const PageId id = page.id_.release();
    place(id) = free();
    free_.push_back(id);
  }

 private:
  PageId& place(PageId id) noexcept { return places_[static_cast<std::size_t>(id)]; }

  std::vector<PageId> free_;
  std::vector<PageId> places_;  // of each page in free_, or -1
};

// In a table: a page that was given back, as no window reaches it any more.
struct Hole {};

// The pages of one request, by position: what the lifecycle calls its Pages.
class PageTable final {
 public:
  using Entry = std::variant<ExclusivePage, SharedPage, Hole>;

  PageTable() = default;
  PageTable(PageTable&&) noexcept = default;
  PageTable& operator=(PageTable&& other) noexcept {
    assert(entries_.empty() && "a page table was overwritten");
    entries_ = std::move(other.entries_);
    return *this;
  }

  std::size_t size() const noexcept { return entries_.size(); }
  bool empty() const noexcept { return entries_.empty(); }
  void reserve(std::size_t pages) { entries_.reserve(pages); }
  void append(ExclusivePage&& page) { entries_.emplace_back(std::move(page)); }
  void append(SharedPage&& page) { entries_.emplace_back(std::move(page)); }
  void append(Hole hole) { entries_.emplace_back(hole); }
  const Entry& operator[](std::size_t index) const noexcept { return entries_[index]; }

  // -1: a hole.
  PageId id(std::size_t index) const noexcept {
    if (const auto* own = std::get_if<ExclusivePage>(&entries_[index])) return own->id();
    const auto* shared = std::get_if<SharedPage>(&entries_[index]);
    return shared ? shared->id() : -1;
  }
  bool exclusive(std::size_t index) const noexcept {
    return std::holds_alternative<ExclusivePage>(entries_[index]);
  }
  // Change an entry's kind: take it out, put its successor in.
  template <class F>
  void replace(std::size_t index, F&& successor) {
    Entry next = successor(std::get<ExclusivePage>(std::move(entries_[index])));
    entries_[index] = std::move(next);
  }
  // Take an entry out, and leave a hole.
  Entry leave_hole(std::size_t index) noexcept {
    Entry left = std::move(entries_[index]);
    entries_[index] = Hole{};
    return left;
  }
  Entry pop() noexcept {
    Entry last = std::move(entries_.back());
    entries_.pop_back();
    return last;
  }

 private:
  std::vector<Entry> entries_;
};

}  // namespace tokenspeed
