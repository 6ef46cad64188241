// The prefix cache with windows, or several groups: paths on the device may have gaps. Rule: what
// is found is as long as each group has what its layers see from there; whatever nobody holds may
// go.
#include <utility>

#include "prefix_index.hpp"

namespace tokenspeed {

// A walk down all nodes there are, of all groups at once; where the run of pages on the device is
// as long as the window in each, there is a place to go on from.
PrefixIndex::Found PrefixIndex::look_through(std::string_view salt, std::span<const Token> wanted,
                                             std::size_t most) const {
  Found out;
  Found here;
  const auto size = index(page_size_);
  std::array<std::int32_t, kGroupsMax> runs{};
  for (std::size_t group = 0; group < groups_.size(); ++group) {
    here.at[group] = find_root(salt, group);
    if (here.at[group] < 0) return out;
  }
  while (index(here.pages) < most) {
    const auto content = wanted.subspan(index(here.pages++) * size, size);
    bool whole = true;
    for (std::size_t group = 0; group < groups_.size(); ++group) {
      Cursor& at = here.at[group];
      at = find(at, hash(at, content), content);
      if (at < 0) return with_held(out);
      runs[group] = nodes_[index(at)].page >= 0 ? runs[group] + 1 : 0;
      here.behind[group] = pages_behind(group, here.pages * page_size_);
      whole = whole && runs[group] >= here.pages - here.behind[group];
    }
    if (whole) out = here;
  }
  return with_held(out);
}

PrefixIndex::Found PrefixIndex::with_held(Found found) const noexcept {
  for (std::size_t group = 0; group < groups_.size(); ++group) {
    Cursor at = found.at[group];
    for (std::int32_t page = found.behind[group]; page < found.pages; ++page) {
      found.held += nodes_[index(at)].references > 0 ? 1 : 0;
      at = nodes_[index(at)].parent;
    }
  }
  return found;
}

void PrefixIndex::watch(std::string_view salt, std::span<const Token> wanted, std::size_t most) {
  ++watch_;
  watches_roots_ = false;
  const auto size = index(page_size_);
  for (std::size_t group = 0; group < groups_.size(); ++group) {
    Cursor at = find_root(salt, group);
    watches_roots_ = watches_roots_ || at < 0;
    for (std::size_t page = 0; at >= 0; ++page) {
      nodes_[index(at)].watch = watch_;
      if (page == most) break;
      const auto content = wanted.subspan(page * size, size);
      at = find(at, hash(at, content), content);
    }
  }
}

void PrefixIndex::go(Cursor at) {
  --nodes_[index(at)].stays;
  forget_if_nowhere(at);
}

PrefixIndex::Cursor PrefixIndex::pass(Cursor at, std::span<const Token> content) {
  const std::uint64_t key = hash(at, content);
  Cursor next = find(at, key, content);
  if (next < 0) {
    next = make(at, key);
    remember(next, content);
  }
  stay(next);
  --nodes_[index(at)].stays;
  return next;
}

void PrefixIndex::remember(NodeId id, std::span<const Token> content) {
  const auto size = index(page_size_);
  if (spare_memories_.empty()) {
    spare_memories_.push_back(static_cast<std::int32_t>(memories_.size() / size));
    memories_.resize(memories_.size() + size);
  }
  const std::int32_t memory = spare_memories_.back();
  spare_memories_.pop_back();
  std::ranges::copy(content, memories_.begin() + std::ptrdiff_t{memory} * page_size_);
  nodes_[index(id)].memory = memory;
}

// A tail goes page by page, in the order in which they were given back, and any page may leave it.
void PrefixIndex::let_go(NodeId id, TailId tail) {
  Node& node = nodes_[index(id)];
  const bool alone = tail < 0;
  if (alone) tail = retention_.open(0, false);
  node.tail = tail;
  retention_.grow(tail, id);
  if (alone) {
    retention_.place(tail, kind::kStranger);
    return settle(id);
  }
  node.goes_before = std::exchange(last_given_back_, id);
  if (node.goes_before >= 0) nodes_[index(node.goes_before)].goes_after = id;
}

// The page that goes after it, if it is the end; the tail knows that it has one page less by what
// is called next.
NodeId PrefixIndex::leave_tail(Node& node) noexcept {
  const TailId tail = std::exchange(node.tail, -1);
  const NodeId before = std::exchange(node.goes_before, -1);
  const NodeId after = std::exchange(node.goes_after, -1);
  if (before >= 0) nodes_[index(before)].goes_after = after;
  if (after >= 0) nodes_[index(after)].goes_before = before;
  if (before < 0 && after >= 0) retention_.end_at(tail, after);
  return before < 0 ? after : -1;
}

void PrefixIndex::evict_anywhere(NodeId id, PagePool& pool) {
  Node& node = nodes_[index(id)];
  touch(node);
  if (node.below > 0 || node.stays > 0) remember(id, tokens(id));
  nodes_by_page_[index(node.page)] = -1;
  pool.give_back(ExclusivePage(std::exchange(node.page, -1)));
  --unheld_;
  ++version_;
  --nodes_[index(node.parent)].children;
  const TailId tail = node.tail;
  const bool end = node.goes_before < 0;
  const NodeId after = leave_tail(node);
  if (end) {
    retention_.cut(tail, after);
  } else {
    retention_.shrink(tail);
  }
  forget_if_nowhere(id);
}

}  // namespace tokenspeed
