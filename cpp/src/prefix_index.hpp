// The prefix cache: a radix tree with a page a node. Rule: it is exact. A node is found by
// comparing its page's tokens, hashes only narrow the search; a salt is a root of its own; a page
// enters when its KV is computed and leaves when nobody holds it and no longer prefix depends on
// it.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tokenspeed/pages.hpp"

namespace tokenspeed {

using Token = std::int32_t;

class PrefixIndex final {
 public:
  // Where a request's next page would hang: a root, or the node of a page that the request holds.
  using Cursor = NodeId;

  PrefixIndex(std::int32_t page_size, PageId pages)
      : page_size_(page_size), nodes_by_page_(static_cast<std::size_t>(pages), -1) {}
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // The root of a salt, made if there is none; or -1, from where nothing hangs.
  Cursor root(std::string_view salt);
  Cursor find_root(std::string_view salt) const;

  // How many leading pages of some tokens are there, of at most `most`, and how many of them nobody
  // holds. Nothing is held by looking.
  struct Found {
    std::int32_t pages = 0;
    std::int32_t unheld = 0;
  };
  Found look(std::string_view salt, std::span<const Token> tokens, std::size_t most) const;

  // One step down: a reference to the child whose page holds exactly `tokens`, and the cursor
  // there. Looking it up and holding it are one action. False if there is none.
  bool match(Cursor& at, std::span<const Token> tokens, PageTable& table);

  // Is a page with exactly `tokens` there, one step down?
  bool contains(Cursor at, std::span<const Token> tokens) const {
    return find(at, hash(at, tokens), tokens) >= 0;
  }

  // Take in a computed page whose content is not there yet; the cursor steps down to it. A request
  // that holds a node holds all above it, so whatever nobody holds can be evicted, leaf by leaf.
  SharedPage publish(Cursor& at, std::span<const Token> tokens, ExclusivePage&& page);

  // Give a reference back.
  void release(SharedPage&& page);

  // The least recently used page that nobody holds and nothing hangs from.
  std::optional<PageId> oldest_evictable() const noexcept;
  // Let such a page go to `pool`; false if it is not one.
  bool evict(PageId page, PagePool& pool);

  bool none_evictable() const noexcept { return evictable_.empty(); }
  // Pages that no request holds.
  PageId unheld() const noexcept { return unheld_; }
  void tick() noexcept { ++now_; }

  // For checks: references that the index counts for a node, and its page.
  std::int32_t references(NodeId node) const { return nodes_[index(node)].references; }
  std::vector<std::pair<NodeId, PageId>> pages() const;
  std::vector<Token> key(NodeId node) const;  // the tokens of its page and of all above
  std::string_view salt(NodeId node) const;   // of the root above it

 private:
  struct Node {
    NodeId parent = -1;
    PageId page = -1;
    std::int32_t references = 0;
    std::int32_t children = 0;
    std::uint64_t used = 0;
    std::uint64_t hash = 0;
  };
  static std::size_t index(NodeId node) noexcept { return static_cast<std::size_t>(node); }

  std::span<const Token> tokens(NodeId node) const noexcept;
  std::uint64_t hash(NodeId parent, std::span<const Token> tokens) const noexcept;
  NodeId find(NodeId parent, std::uint64_t hash, std::span<const Token> tokens) const;
  NodeId make();
  void drop_root_if_unused(NodeId root);
  bool can_go(const Node& node) const noexcept {
    return node.references == 0 && node.children == 0 && node.page >= 0;
  }

  std::int32_t page_size_;
  PageId unheld_ = 0;
  std::uint64_t now_ = 0;
  std::vector<Node> nodes_;
  std::vector<Token> node_tokens_;
  std::vector<NodeId> nodes_by_page_;
  std::vector<NodeId> spare_;
  std::unordered_multimap<std::uint64_t, NodeId> children_;
  std::unordered_map<std::string, NodeId> roots_;
  std::unordered_map<NodeId, std::string> salts_;
  std::set<std::pair<std::uint64_t, NodeId>> evictable_;
};

}  // namespace tokenspeed
