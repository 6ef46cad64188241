#include "prefix_index.hpp"

#include <algorithm>
#include <cassert>

namespace tokenspeed {

PrefixIndex::Cursor PrefixIndex::root(std::string_view salt) {
  if (const Cursor found = find_root(salt); found >= 0) return found;
  const NodeId node = make();
  roots_.emplace(salt, node);
  salts_.emplace(node, salt);
  return node;
}

PrefixIndex::Cursor PrefixIndex::find_root(std::string_view salt) const {
  const auto found = roots_.find(std::string(salt));
  return found == roots_.end() ? -1 : found->second;
}

PrefixIndex::Found PrefixIndex::look(std::string_view salt, std::span<const Token> wanted,
                                     std::size_t most) const {
  Found out;
  Cursor at = find_root(salt);
  const auto size = static_cast<std::size_t>(page_size_);
  while (at >= 0 && static_cast<std::size_t>(out.pages) < most) {
    const auto page = wanted.subspan(static_cast<std::size_t>(out.pages) * size, size);
    at = find(at, hash(at, page), page);
    if (at < 0) break;
    ++out.pages;
    if (nodes_[index(at)].references == 0) ++out.unheld;
  }
  return out;
}

bool PrefixIndex::match(Cursor& at, std::span<const Token> wanted, PageTable& table) {
  if (at < 0) return false;
  const NodeId child = find(at, hash(at, wanted), wanted);
  if (child < 0) return false;
  Node& node = nodes_[index(child)];
  if (node.references++ == 0) {
    --unheld_;
    evictable_.erase({node.used, child});
  }
  node.used = now_;
  table.append(SharedPage(child, node.page));
  at = child;
  return true;
}

SharedPage PrefixIndex::publish(Cursor& at, std::span<const Token> content, ExclusivePage&& page) {
  assert(!contains(at, content) && "the same content twice");
  const std::uint64_t key = hash(at, content);
  const NodeId child = make();
  const NodeId parent = at;
  ++nodes_[index(parent)].children;
  Node& node = nodes_[index(child)];
  node.parent = parent;
  node.page = page.id_.release();
  node.references = 1;
  node.used = now_;
  node.hash = key;
  std::copy(content.begin(), content.end(),
            node_tokens_.begin() + static_cast<std::ptrdiff_t>(index(child)) * page_size_);
  children_.emplace(key, child);
  nodes_by_page_[index(node.page)] = child;
  at = child;
  return SharedPage(child, node.page);
}

void PrefixIndex::release(SharedPage&& page) {
  const NodeId id = page.node_.release();
  Node& node = nodes_[index(id)];
  if (--node.references > 0) return;
  ++unheld_;
  node.used = now_;
  if (can_go(node)) evictable_.emplace(node.used, id);
}

std::optional<PageId> PrefixIndex::oldest_evictable() const noexcept {
  if (evictable_.empty()) return std::nullopt;
  return nodes_[index(evictable_.begin()->second)].page;
}

bool PrefixIndex::evict(PageId page, PagePool& pool) {
  if (page < 0 || index(page) >= nodes_by_page_.size()) return false;
  const NodeId id = nodes_by_page_[index(page)];
  if (id < 0 || !can_go(nodes_[index(id)])) return false;
  Node& node = nodes_[index(id)];
  evictable_.erase({node.used, id});
  nodes_by_page_[index(page)] = -1;
  const auto [first, last] = children_.equal_range(node.hash);
  children_.erase(std::find_if(first, last, [id](const auto& item) { return item.second == id; }));
  pool.give_back(ExclusivePage(node.page));
  --unheld_;
  const NodeId parent = node.parent;
  node.page = -1;
  spare_.push_back(id);
  Node& above = nodes_[index(parent)];
  --above.children;
  if (can_go(above)) evictable_.emplace(above.used, parent);
  drop_root_if_unused(parent);
  return true;
}

// A salt that nothing is cached under costs nothing.
void PrefixIndex::drop_root_if_unused(NodeId root) {
  const auto salt = salts_.find(root);
  if (salt == salts_.end() || nodes_[index(root)].children > 0) return;
  roots_.erase(salt->second);
  salts_.erase(salt);
  spare_.push_back(root);
}

std::vector<std::pair<NodeId, PageId>> PrefixIndex::pages() const {
  std::vector<std::pair<NodeId, PageId>> out;
  for (NodeId id = 0; index(id) < nodes_.size(); ++id) {
    if (nodes_[index(id)].page >= 0) out.emplace_back(id, nodes_[index(id)].page);
  }
  return out;
}

std::vector<Token> PrefixIndex::key(NodeId node) const {
  if (nodes_[index(node)].page < 0) return {};  // a root
  std::vector<Token> out = key(nodes_[index(node)].parent);
  const auto own = tokens(node);
  out.insert(out.end(), own.begin(), own.end());
  return out;
}

std::string_view PrefixIndex::salt(NodeId node) const {
  while (nodes_[index(node)].page >= 0) node = nodes_[index(node)].parent;
  return salts_.at(node);
}

std::span<const Token> PrefixIndex::tokens(NodeId node) const noexcept {
  const auto size = static_cast<std::size_t>(page_size_);
  return {node_tokens_.data() + index(node) * size, size};
}

// FNV-1a over the parent and the tokens: it only narrows the search.
std::uint64_t PrefixIndex::hash(NodeId parent, std::span<const Token> content) const noexcept {
  std::uint64_t value = 14695981039346656037ULL ^ static_cast<std::uint32_t>(parent);
  for (const Token token : content) {
    value = (value ^ static_cast<std::uint32_t>(token)) * 1099511628211ULL;
  }
  return value ^ (value >> 32);
}

NodeId PrefixIndex::find(NodeId parent, std::uint64_t key, std::span<const Token> wanted) const {
  const auto [first, last] = children_.equal_range(key);
  for (auto item = first; item != last; ++item) {
    const NodeId id = item->second;
    if (nodes_[index(id)].parent == parent && std::ranges::equal(tokens(id), wanted)) return id;
  }
  return -1;
}

NodeId PrefixIndex::make() {
  if (!spare_.empty()) {
    const NodeId id = spare_.back();
    spare_.pop_back();
    nodes_[index(id)] = Node{};
    return id;
  }
  nodes_.emplace_back();
  node_tokens_.resize(nodes_.size() * static_cast<std::size_t>(page_size_));
  return static_cast<NodeId>(nodes_.size() - 1);
}

}  // namespace tokenspeed
