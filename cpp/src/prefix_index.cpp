#include "prefix_index.hpp"

#include <bit>
#include <cassert>
#include <cstring>

namespace tokenspeed {

PrefixIndex::PrefixIndex(std::int32_t page_size, PageId pages, PageId kept_max, HostPage host_pages,
                         std::span<const CacheGroup> groups)
    : page_size_(page_size),
      groups_(groups.begin(), groups.end()),
      pages_(pages),
      retention_(pages, kept_max),
      page_tokens_(std::make_unique_for_overwrite<Token[]>(index(page_size) *
                                                           (index(pages) + index(host_pages)))),
      nodes_by_page_(index(pages), -1),
      buckets_(std::bit_ceil(index(pages) + index(host_pages)), -1) {
  if (groups_.empty()) groups_.emplace_back();
  gaps_ = groups_.size() > 1 || groups_[0].window > 0;
  roots_.resize(groups_.size());
  const std::size_t remembered = gaps_ ? 2 * index(pages) : 0;  // for now: it may grow
  memories_.reserve(remembered * index(page_size));
  spare_memories_.reserve(remembered);
  const std::size_t nodes =
      2 * (index(pages) + index(host_pages)) + remembered;  // each may have its own root
  nodes_.reserve(nodes);
  spare_.reserve(nodes);
  path_.reserve(index(pages));
}

// --- roots -------------------------------------------------------------------------------------

PrefixIndex::Cursor PrefixIndex::enter(std::string_view salt, std::size_t group) {
  Cursor root = find_root(salt, group);
  if (root < 0) {
    root = make();
    touched_ += watches_roots_ ? 1 : 0;
    nodes_[index(root)].group = static_cast<std::uint8_t>(group);
    roots_[group].emplace(salt, root);
    salts_.emplace(root, salt);
  }
  ++nodes_[index(root)].references;
  return root;
}

void PrefixIndex::leave(Cursor root) {
  --nodes_[index(root)].references;
  drop_root_if_unused(root);
}

PrefixIndex::Cursor PrefixIndex::find_root(std::string_view salt, std::size_t group) const {
  const auto found = roots_[group].find(std::string(salt));
  return found == roots_[group].end() ? -1 : found->second;
}

// A salt that nothing is cached under, and nobody uses, costs nothing.
void PrefixIndex::drop_root_if_unused(NodeId root) {
  const Node& node = nodes_[index(root)];
  if (!is_root(root) || node.below > 0 || node.stays > 0 || node.references > 0) return;
  const auto salt = salts_.find(root);
  roots_[node.group].erase(salt->second);
  salts_.erase(salt);
  spare_.push_back(root);
}

// --- looking, and holding what was found -------------------------------------------------------

PrefixIndex::Found PrefixIndex::look(std::string_view salt, std::span<const Token> wanted,
                                     std::size_t most) const {
  ++looks_;
  if (gaps_) return look_through(salt, wanted, most);
  Found out;
  const auto size = index(page_size_);
  Cursor at = find_root(salt, 0);
  while (at >= 0 && index(out.pages) < most) {
    const auto page = wanted.subspan(index(out.pages) * size, size);
    at = find(at, hash(at, page), page);
    if (at < 0 || nodes_[index(at)].page < 0) break;
    out.at[0] = at;
    ++out.pages;
    if (nodes_[index(at)].references > 0) ++out.held;
  }
  return out;
}

PrefixIndex::Held PrefixIndex::held(const Found& found) const noexcept {
  if (found.held == 0 || gaps_) return {found.held, -1, 0};
  Cursor at = found.at[0];
  for (std::int32_t above = found.held; above < found.pages; ++above) at = nodes_[index(at)].parent;
  return {found.held, at, nodes_[index(at)].born};
}

bool PrefixIndex::deepen(Held& held, std::string_view salt, std::span<const Token> wanted,
                         std::size_t most) const {
  if (held.pages > 0 && nodes_[index(held.at)].born != held.born) return false;
  // If nobody holds it any more, nobody holds what is below it.
  if (held.pages > 0 && nodes_[index(held.at)].references == 0) return true;
  const auto size = index(page_size_);
  Cursor at = held.pages > 0 ? held.at : find_root(salt, 0);
  while (at >= 0 && index(held.pages) < most) {
    const auto page = wanted.subspan(index(held.pages) * size, size);
    at = find(at, hash(at, page), page);
    if (at < 0 || nodes_[index(at)].references == 0) break;
    held = {held.pages + 1, at, nodes_[index(at)].born};
  }
  return true;
}

bool PrefixIndex::hold(const Found& found, PageTable& table, std::uint64_t session) {
  const std::size_t groups = groups_.size();
  path_.assign(index(found.pages) * groups, -1);
  for (std::size_t group = 0; group < groups; ++group) {
    NodeId above = found.at[group];
    for (std::int32_t page = found.pages; page-- > found.behind[group];) {
      path_[index(page) * groups + group] = above;
      above = nodes_[index(above)].parent;
    }
  }
  bool revisits = false;
  TailId before = -1;
  for (const NodeId id : path_) {
    if (id < 0) {
      table.append(Hole{});
      continue;
    }
    Node& node = nodes_[index(id)];
    if (node.references++ == 0) {
      touch(node);
      --unheld_;
      ++gained_;
      ++version_;
      const TailId tail = node.tail;
      leave_tail(node);
      if (tail != before) revisits |= retention_.touch(tail, session);
      before = tail;
      retention_.shrink(tail);
      settle(id);
    }
    table.append(SharedPage(id, node.page));
  }
  return revisits;
}

// --- coming and going --------------------------------------------------------------------------

std::optional<PrefixIndex::Vacancy> PrefixIndex::vacancy(Cursor at,
                                                         std::span<const Token> content) const {
  const std::uint64_t key = hash(at, content);
  const NodeId there = find(at, key, content);
  if (there >= 0 && nodes_[index(there)].page >= 0) return std::nullopt;
  return Vacancy(key, there);
}

SharedPage PrefixIndex::publish(Cursor& at, std::span<const Token> content, Vacancy vacancy,
                                ExclusivePage&& page) {
  assert(vacancy.key_ == hash(at, content) && "a vacancy for something else");
  assert(find(at, vacancy.key_, content) == vacancy.there_ && "the same content twice");
  const NodeId child = vacancy.there_ >= 0 ? vacancy.there_ : make(at, vacancy.key_);
  Node& node = nodes_[index(child)];
  ++nodes_[index(at)].children;
  if (node.memory >= 0) spare_memories_.push_back(std::exchange(node.memory, -1));
  if (gaps_) {
    touch(node);
    stay(child);
    --nodes_[index(at)].stays;
  }
  node.page = page.id_.release();
  node.references = 1;
  std::ranges::copy(content, row(node.page));
  nodes_by_page_[index(node.page)] = child;
  ++gained_;
  ++version_;
  at = child;
  return SharedPage(child, node.page);
}

void PrefixIndex::release(SharedPage&& page, TailId tail) {
  const NodeId id = page.node_.release();
  Node& node = nodes_[index(id)];
  if (--node.references > 0) return;
  ++unheld_;
  ++version_;
  node.used = ++uses_;
  if (gaps_) return let_go(id, tail);
  node.tail = tail;
  retention_.grow(tail, id);
}

TailId PrefixIndex::close_tail(TailId tail) {
  const NodeId end = retention_.close(tail);
  if (end < 0) return -1;
  settle(end);
  return tail;
}

std::optional<PageId> PrefixIndex::next_evictable() const noexcept {
  const NodeId node = retention_.victim();
  return node < 0 ? std::nullopt : std::optional(nodes_[index(node)].page);
}

std::optional<PageId> PrefixIndex::next_evictable_but(NodeId spared, bool unwanted) {
  const bool spare = spared >= 0 && !is_root(spared);
  if (spare) pin(spared);
  const bool none = unwanted && retention_.victim_is_wanted();
  const auto page = none ? std::nullopt : next_evictable();
  if (spare) unpin(spared);
  return page;
}

bool PrefixIndex::evict(PageId page, PagePool& pool) {
  if (page < 0 || index(page) >= nodes_by_page_.size()) return false;
  const NodeId id = nodes_by_page_[index(page)];
  if (id < 0 || !can_go(nodes_[index(id)])) return false;
  if (gaps_) {
    evict_anywhere(id, pool);
    return true;
  }
  Node& node = nodes_[index(id)];
  nodes_by_page_[index(page)] = -1;
  pool.give_back(ExclusivePage(std::exchange(node.page, -1)));
  --unheld_;
  ++version_;
  const NodeId parent = node.parent;
  const TailId tail = std::exchange(node.tail, -1);
  --nodes_[index(parent)].children;
  forget_if_nowhere(id);
  const Node& above = nodes_[index(parent)];
  const bool goes_on = above.tail == tail;
  retention_.cut(tail, goes_on ? parent : -1);
  if (goes_on && !leaf(above)) retention_.must_stay(tail);
  settle(parent);
  drop_root_if_unused(parent);
  return true;
}

std::vector<std::pair<NodeId, PageId>> PrefixIndex::pages() const {
  std::vector<std::pair<NodeId, PageId>> out;
  for (NodeId id = 0; index(id) < nodes_.size(); ++id) {
    if (nodes_[index(id)].page >= 0) out.emplace_back(id, nodes_[index(id)].page);
  }
  return out;
}

std::vector<Token> PrefixIndex::key(NodeId node) const {
  if (is_root(node)) return {};
  std::vector<Token> out = key(parent(node));
  const auto own = tokens(node);
  out.insert(out.end(), own.begin(), own.end());
  return out;
}

std::string_view PrefixIndex::salt(NodeId node) const {
  while (!is_root(node)) node = parent(node);
  return salts_.at(node);
}

bool PrefixIndex::tails_right() const {
  PageId in_tails = 0;
  for (const auto& [id, page] : pages()) {
    const Node& node = nodes_[index(id)];
    if ((node.references == 0) != (node.tail >= 0)) return false;
    in_tails += node.tail >= 0 ? 1 : 0;
    if (can_go(node) && node.goes_before < 0 && retention_.end(node.tail) != id) return false;
  }
  return in_tails == unheld_ && retention_.right(in_tails);
}

std::span<const Token> PrefixIndex::tokens(NodeId id) const noexcept {
  const Node& node = nodes_[index(id)];
  if (node.memory >= 0) {
    return {memories_.data() + index(node.memory) * index(page_size_), index(page_size_)};
  }
  const PageId at = node.page >= 0 ? node.page : pages_ + node.host;
  return {page_tokens_.get() + index(at) * index(page_size_), index(page_size_)};
}

// --- the second home ---------------------------------------------------------------------------

NodeId PrefixIndex::node(PageId page) const noexcept {
  return page >= 0 && page < pages_ ? nodes_by_page_[index(page)] : -1;
}

// What somebody holds is used now.
std::uint64_t PrefixIndex::last_used(NodeId id) const noexcept {
  const Node& node = nodes_[index(id)];
  return node.references > 0 ? uses_ + 1 : node.used;
}

void PrefixIndex::pin(NodeId id) {
  for (const NodeId at : {id, parent(id)}) {
    ++nodes_[index(at)].pins;
    settle(at);
  }
}

void PrefixIndex::unpin(NodeId id) {
  for (const NodeId at : {id, parent(id)}) {
    --nodes_[index(at)].pins;
    settle(at);
  }
}

void PrefixIndex::move_in(NodeId id, HostPage host) {
  std::ranges::copy(tokens(id), row(pages_ + host));
  nodes_[index(id)].host = host;
  ++nodes_[index(parent(id))].hosted;
}

void PrefixIndex::move_out(NodeId id) {
  const NodeId above = parent(id);
  nodes_[index(id)].host = -1;
  --nodes_[index(above)].hosted;
  forget_if_nowhere(id);
  drop_root_if_unused(above);
}

void PrefixIndex::appear(NodeId id, ExclusivePage&& page) {
  const auto content = tokens(id);
  Node& node = nodes_[index(id)];
  node.page = page.id_.release();
  node.used = ++uses_;
  node.tail = retention_.open(0, false);
  retention_.grow(node.tail, id);
  retention_.place(node.tail, kind::kAwaited);
  std::ranges::copy(content, row(node.page));
  nodes_by_page_[index(node.page)] = id;
  ++nodes_[index(node.parent)].children;
  ++unheld_;
  ++version_;
  settle(node.parent);
  settle(id);
}

void PrefixIndex::beyond(const Found& found, std::span<const Token> wanted, std::size_t most,
                         std::string_view salt, std::vector<HostPage>& out) const {
  const auto size = index(page_size_);
  Cursor at = found.pages > 0 ? found.at[0] : find_root(salt, 0);
  for (std::size_t page = index(found.pages); at >= 0 && page < most; ++page) {
    const auto content = wanted.subspan(page * size, size);
    at = find(at, hash(at, content), content);
    if (at < 0 || nodes_[index(at)].host < 0 || nodes_[index(at)].page >= 0) return;
    out.push_back(nodes_[index(at)].host);
  }
}

PrefixIndex::Trail PrefixIndex::trail(Cursor end) const {
  Trail out;
  std::int64_t climb = 1;
  for (Place& place : out) {
    if (end < 0 || is_root(end)) break;
    place = {end, nodes_[index(end)].born};
    for (std::int64_t step = 0; step < climb && !is_root(end); ++step) end = parent(end);
    climb *= 2;
  }
  return out;
}

std::vector<PrefixIndex::Place> PrefixIndex::on_host(const Trail& trail) const {
  std::vector<Place> out;
  const auto left = std::ranges::find_if(trail, [this](const Place& each) { return there(each); });
  if (left == trail.end()) return out;
  for (NodeId at = left->node; !is_root(at) && page(at) < 0; at = parent(at)) {
    out.push_back({at, nodes_[index(at)].born});
  }
  std::ranges::reverse(out);
  return out;
}

Retention::Name PrefixIndex::keep(NodeId node, Kind as, Microseconds until) {
  const TailId tail = nodes_[index(node)].tail;
  if (tail < 0) return {};  // somebody holds it
  retention_.place(tail, as, until);
  return retention_.name(tail);
}

// --- nodes by parent and content ---------------------------------------------------------------

// Over the parent and the tokens: it only narrows the search. Two tokens at a time, in four lanes,
// so that a multiplication need not wait for the one before.
std::uint64_t PrefixIndex::hash(NodeId parent, std::span<const Token> content) const noexcept {
  constexpr std::uint64_t kOdd = 0x9E3779B97F4A7C15ULL;
  constexpr std::size_t kLanes = 4;
  std::uint64_t lanes[kLanes] = {static_cast<std::uint32_t>(parent) + kOdd, kOdd << 1, kOdd << 2,
                                 kOdd << 3};
  const auto mix = [](std::uint64_t lane, std::uint64_t word) {
    return std::rotl(lane ^ word, 29) * kOdd;
  };
  const Token* at = content.data();
  std::size_t left = content.size();
  for (; left >= 2 * kLanes; left -= 2 * kLanes, at += 2 * kLanes) {
    std::uint64_t words[kLanes];
    std::memcpy(words, at, sizeof words);
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = mix(lanes[lane], words[lane]);
  }
  for (; left > 0; --left, ++at) lanes[0] = mix(lanes[0], static_cast<std::uint32_t>(*at));
  std::uint64_t value = lanes[0];
  for (std::size_t lane = 1; lane < kLanes; ++lane) value = mix(value, lanes[lane]);
  return value ^ (value >> 32);
}

NodeId PrefixIndex::find(NodeId parent, std::uint64_t key,
                         std::span<const Token> wanted) const noexcept {
  const auto same = [&](NodeId node) {
    return std::memcmp(tokens(node).data(), wanted.data(), wanted.size_bytes()) == 0;
  };
  NodeId id = buckets_[key & (buckets_.size() - 1)];
  for (; id >= 0; id = nodes_[index(id)].next) {
    const Node& node = nodes_[index(id)];
    if (node.hash == key && node.parent == parent && same(id)) return id;
  }
  return -1;
}

void PrefixIndex::unchain(NodeId id) noexcept {
  const Node& node = nodes_[index(id)];
  NodeId* link = &buckets_[node.hash & (buckets_.size() - 1)];
  while (*link != id) link = &nodes_[index(*link)].next;
  *link = node.next;
}

// Neither on the device nor on the host, and nothing hangs from it: without a window, what does is
// where it is. Then what it hung from may be as useless.
void PrefixIndex::forget_if_nowhere(NodeId id) {
  while (!is_root(id)) {
    Node& node = nodes_[index(id)];
    if (node.page >= 0 || node.host >= 0 || node.below > 0 || node.stays > 0) return;
    unchain(id);
    if (node.memory >= 0) spare_memories_.push_back(node.memory);
    const NodeId above = node.parent;
    node = Node{};
    spare_.push_back(id);
    --nodes_[index(above)].below;
    id = above;
  }
  if (gaps_) drop_root_if_unused(id);
}

NodeId PrefixIndex::make(NodeId parent, std::uint64_t key) {
  const NodeId id = make();
  Node& node = nodes_[index(id)];
  ++nodes_[index(parent)].below;
  touch(nodes_[index(parent)]);
  node.parent = parent;
  node.hash = key;
  node.born = ++births_;
  node.next = std::exchange(buckets_[key & (buckets_.size() - 1)], id);
  return id;
}

NodeId PrefixIndex::make() {
  if (spare_.empty()) {
    nodes_.emplace_back();
    return static_cast<NodeId>(nodes_.size() - 1);
  }
  const NodeId id = spare_.back();
  spare_.pop_back();
  nodes_[index(id)] = Node{};
  return id;
}

// After whatever an eviction depends on has changed. A leaf is the end of its tail.
void PrefixIndex::settle(NodeId id) {
  Node& node = nodes_[index(id)];
  const bool pinned = leaf(node) && node.pins > 0;
  pinned_leaves_ += static_cast<PageId>(pinned) - static_cast<PageId>(node.pinned_leaf);
  node.pinned_leaf = pinned;
  if (pinned) {
    retention_.must_stay(node.tail);
  } else if (can_go(node)) {
    retention_.may_go(node.tail);
  }
}

}  // namespace tokenspeed
