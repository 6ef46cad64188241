#include "host_tier.hpp"

#include <algorithm>
#include <utility>

namespace tokenspeed {

std::string_view name(HostTier::Kind kind) noexcept {
  switch (kind) {
    case HostTier::Kind::Free:
      return "Free";
    case HostTier::Kind::Storing:
      return "Storing";
    default:
      return "Present";  // also while it is being read
  }
}

HostTier::HostTier(PrefixIndex& index, PagePool& pool, HostPage pages)
    : index_(index), pool_(pool), pages_(HostTier::index(pages)), free_(pages) {
  moving_.reserve(pages_.size());
  heap_.reserve(pages_.size());
  places_.assign(pages_.size(), -1);
  used_.assign(pages_.size(), 0);
}

// --- copies ------------------------------------------------------------------------------------

// Present, or on its way: the page above, in the home that a copy leads to.
bool HostTier::storable(PageId page) const noexcept {
  const NodeId node = index_.node(page);
  if (node < 0 || index_.host(node) >= 0) return false;
  const NodeId above = index_.parent(node);
  return index_.is_root(above) || index_.host(above) >= 0;
}

bool HostTier::store_start(PageId page, HostPage to) {
  if (!storable(page)) return false;
  auto own = free_.take(to);
  if (!own) return false;
  Page& home = pages_[index(to)];
  home.own.emplace(std::move(*own));
  home.kind = Kind::Storing;
  home.node = index_.node(page);
  const NodeId above = index_.parent(home.node);
  index_.move_in(home.node, to);
  if (!index_.is_root(above)) settle(index_.host(above));
  begin(to, page);
  return true;
}

bool HostTier::store_end(HostPage to, bool good) {
  if (to < 0 || to >= total()) return false;
  Page& home = pages_[index(to)];
  if (home.kind != Kind::Storing || waits(home)) return false;
  end(to);
  if (good && above_is_home(home.node)) {
    home.kind = Kind::Present;
    ++present_;
    settle(to);
  } else {
    free_again(to);
  }
  return true;
}

bool HostTier::load_start(HostPage from, PageId page) {
  if (from < 0 || from >= total()) return false;
  Page& home = pages_[index(from)];
  if (home.kind != Kind::Present || index_.page(home.node) >= 0) return false;
  const NodeId above = index_.parent(home.node);
  const bool there = index_.is_root(above) || index_.page(above) >= 0 ||
                     pages_[index(index_.host(above))].kind == Kind::Loading;
  if (!there) return false;
  auto taken = pool_.take(page);
  if (!taken) return false;
  home.taken.emplace(std::move(*taken));
  home.kind = Kind::Loading;
  ++loading_;
  settle(from);
  begin(from, page);
  return true;
}

bool HostTier::load_end(HostPage from, bool good) {
  if (from < 0 || from >= total()) return false;
  Page& home = pages_[index(from)];
  if (home.kind != Kind::Loading || waits(home)) return false;
  const NodeId above = index_.parent(home.node);
  const bool there = index_.is_root(above) || index_.page(above) >= 0;
  home.kind = Kind::Present;
  --loading_;
  if (good && there && index_.page(home.node) < 0) {  // nobody has computed the same meanwhile
    index_.appear(home.node, std::move(*home.taken));
  } else {
    pool_.give_back(std::move(*home.taken));
  }
  home.taken.reset();
  end(from);
  settle(from);
  return true;
}

bool HostTier::drop(HostPage page) {
  if (page < 0 || page >= total() || pages_[index(page)].kind != Kind::Present) return false;
  if (!index_.host_leaf(pages_[index(page)].node)) return false;
  --present_;
  free_again(page);
  return true;
}

// Is the same copy of the page above still under way?
bool HostTier::waits(const Page& page) const noexcept {
  const NodeId above = index_.parent(page.node);
  if (index_.is_root(above) || index_.host(above) < 0) return false;
  return pages_[index(index_.host(above))].kind == page.kind;
}

bool HostTier::above_is_home(NodeId node) const noexcept {
  const NodeId above = index_.parent(node);
  return index_.is_root(above) || index_.host(above) >= 0;
}

void HostTier::begin(HostPage at, PageId copied) {
  Page& page = pages_[index(at)];
  page.ack = Ack::None;
  page.forsaken = false;
  page.copied = copied;
  page.ticket = copies_++ * total() + at;
  moving_.push_back(at);
  index_.pin(page.node);
}

void HostTier::end(HostPage at) {
  Page& page = pages_[index(at)];
  page.ack = Ack::None;
  page.copied = -1;
  page.ticket = -1;
  std::erase(moving_, at);
  index_.unpin(page.node);
}

void HostTier::free_again(HostPage at) {
  Page& page = pages_[index(at)];
  page.kind = Kind::Free;
  settle(at);
  const NodeId node = std::exchange(page.node, -1);
  const NodeId above = index_.parent(node);
  const HostPage host = index_.is_root(above) ? -1 : index_.host(above);
  index_.move_out(node);
  if (host >= 0) settle(host);
  free_.give_back(std::move(*page.own));
  page.own.reset();
}

bool HostTier::acknowledge(std::int64_t ticket, bool good) {
  if (ticket < 0 || pages_.empty()) return false;
  Page& page = pages_[static_cast<std::size_t>(ticket) % pages_.size()];
  if (page.ticket != ticket || page.ack != Ack::None) return false;
  page.ack = good && !page.forsaken ? Ack::Good : Ack::Bad;
  return true;
}

// --- when all is to go -------------------------------------------------------------------------

void HostTier::forsake() {
  for (const HostPage at : moving_) {
    Page& page = pages_[index(at)];
    page.forsaken = true;
    if (page.ack == Ack::Good) page.ack = Ack::Bad;
  }
}

void HostTier::drain() {
  for (Page& page : pages_) {
    if (page.taken) pool_.give_back(std::move(*page.taken));
    if (page.own) free_.give_back(std::move(*page.own));
    page.taken.reset();
    page.own.reset();
  }
}

// Each page is walked over once: what is above it says how far below the node it is.
std::vector<HostPage> HostTier::below(NodeId node) const {
  constexpr std::int32_t kUnknown = -2;
  constexpr std::int32_t kElsewhere = -1;
  std::vector<std::int32_t> depths(pages_.size(), kUnknown);
  std::vector<HostPage> path;
  std::vector<std::pair<std::int32_t, HostPage>> found;
  for (HostPage page = 0; page < total(); ++page) {
    if (pages_[index(page)].kind == Kind::Free) continue;
    std::int32_t depth = kElsewhere;
    for (NodeId at = pages_[index(page)].node; !index_.is_root(at); at = index_.parent(at)) {
      const HostPage here = index_.host(at);
      if (here < 0) break;  // a store whose page above went: it will be in vain
      depth = at == node ? 0 : depths[index(here)];
      if (depth != kUnknown) break;
      depth = kElsewhere;
      path.push_back(here);
    }
    for (; !path.empty(); path.pop_back()) {
      if (depth >= 0) found.emplace_back(-++depth, path.back());
      depths[index(path.back())] = depth;
    }
  }
  if (index_.host(node) >= 0) found.emplace_back(0, index_.host(node));
  std::ranges::sort(found);
  std::vector<HostPage> out;
  for (const auto& [depth, page] : found) out.push_back(page);
  return out;
}

// --- which page may go -------------------------------------------------------------------------

std::optional<HostPage> HostTier::oldest() {
  while (!heap_.empty()) {
    const HostPage first = heap_.front();
    const std::uint64_t used = index_.last_used(pages_[index(first)].node);
    if (std::exchange(used_[index(first)], used) == used) return first;
    sift(0);
  }
  return std::nullopt;
}

bool HostTier::earlier(HostPage a, HostPage b) const noexcept {
  return std::pair(used_[index(a)], a) < std::pair(used_[index(b)], b);
}

void HostTier::put(std::size_t place, HostPage page) noexcept {
  heap_[place] = page;
  places_[index(page)] = static_cast<std::int32_t>(place);
}

void HostTier::sift(std::size_t place) noexcept {
  const HostPage page = heap_[place];
  for (; place > 0 && earlier(page, heap_[(place - 1) / 2]); place = (place - 1) / 2) {
    put(place, heap_[(place - 1) / 2]);
  }
  for (std::size_t child = 2 * place + 1; child < heap_.size(); child = 2 * place + 1) {
    if (child + 1 < heap_.size() && earlier(heap_[child + 1], heap_[child])) ++child;
    if (!earlier(heap_[child], page)) break;
    put(place, heap_[child]);
    place = child;
  }
  put(place, page);
}

// After whatever decides whether a page may be dropped has changed.
void HostTier::settle(HostPage page) {
  const Page& home = pages_[index(page)];
  const bool may_go = home.kind == Kind::Present && index_.host_leaf(home.node);
  std::int32_t& place = places_[index(page)];
  if (may_go && place < 0) {
    used_[index(page)] = index_.last_used(home.node);
    heap_.push_back(page);
    sift(heap_.size() - 1);
  } else if (!may_go && place >= 0) {
    const auto hole = static_cast<std::size_t>(std::exchange(place, -1));
    const HostPage last = heap_.back();
    heap_.pop_back();
    if (last == page) return;
    put(hole, last);
    sift(hole);
  }
}

}  // namespace tokenspeed
