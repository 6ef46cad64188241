// The prefix cache: a radix tree with a page a node. Rule: it is exact. A node is found by
// comparing its page's tokens, hashes only narrow the search; a salt is a root of its own; a page
// enters when its KV is computed and leaves when nobody holds it and no longer prefix depends on
// it. A node's KV is on the device, on the host, or on both; those on the device are a tree from
// the roots down, and so are those on the host. With a window, those on the device may have gaps:
// a node below which something is left, or somebody goes on, is remembered by its tokens alone. So
// it is with several cache groups, each of which has a root of its own for a salt: a page is of
// one.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "retention.hpp"
#include "tokenspeed/pages.hpp"

namespace tokenspeed {

using Token = std::int32_t;
using HostPage = std::int32_t;

// What layers that cache alike see of a sequence. All groups take their pages from one pool.
struct CacheGroup {
  std::int32_t window = 0;  // tokens that one sees, itself included; 0: all before it
};
inline constexpr std::size_t kGroupsMax = 16;

class PrefixIndex final {
 public:
  // Where a request's next page would hang: a root, or the node of a page that the request holds.
  using Cursor = NodeId;

  // All memory that as many pages need is reserved here; what is not used is not touched.
  // At most `kept_max` pages are kept by wish. Host pages are for one group alone, without a
  // window.
  PrefixIndex(std::int32_t page_size, PageId pages, PageId kept_max, HostPage host_pages,
              std::span<const CacheGroup> groups = {});
  PrefixIndex(const PrefixIndex&) = delete;
  PrefixIndex& operator=(const PrefixIndex&) = delete;

  // The root of a salt, made if there is none, kept while somebody is there or a page hangs from
  // it.
  Cursor enter(std::string_view salt, std::size_t group = 0);
  void leave(Cursor root);

  // Of the first positions, as many as have been computed, the pages that no later token sees.
  std::int32_t pages_behind(std::size_t group, std::int32_t computed) const noexcept {
    const std::int32_t window = groups_[group].window;
    return window == 0 ? 0 : std::max(0, computed + 1 - window) / page_size_;
  }

  // Leading pages of some tokens, of at most `most`, that are on the device, and how many of them
  // somebody holds: who holds a page holds all above it. With windows: so many that in each group
  // those which the token after them sees, all but the first `behind`, are there. Nothing is held
  // by looking.
  struct Found {
    std::int32_t pages = 0;  // of each group
    std::int32_t held = 0;   // of all groups together
    std::array<std::int32_t, kGroupsMax> behind{};
    std::array<Cursor, kGroupsMax> at{-1};  // the last page found, of each group
  };
  Found look(std::string_view salt, std::span<const Token> tokens, std::size_t most) const;

  // With gaps: from now on `touched` counts what may let more of these tokens' pages be found, or
  // be held: one on their path came, went or found a holder, or a node was made right behind it.
  void watch(std::string_view salt, std::span<const Token> tokens, std::size_t most);
  std::uint64_t touched() const noexcept { return touched_; }
  // Walks down the index, by `look`: what a waiting request costs.
  std::uint64_t looks() const noexcept { return looks_; }
  // Nodes there are: roots, what is cached, and what is remembered above it.
  std::size_t nodes() const noexcept { return nodes_.size() - spare_.size(); }

  // Where the held ones among them ended, to go on from there instead of from the root.
  struct Held {
    std::int32_t pages = 0;
    Cursor at = -1;
    std::uint64_t born = 0;
  };
  Held held(const Found& found) const noexcept;
  // Brings it up to date: afterwards no more than `held.pages` of the tokens' pages are held. False
  // if its page was evicted, so that only looking anew can tell.
  bool deepen(Held& held, std::string_view salt, std::span<const Token> tokens,
              std::size_t most) const;

  // With windows: somebody goes on from here, or no longer does; until then it is remembered.
  void stay(Cursor at) noexcept { ++nodes_[index(at)].stays; }
  void go(Cursor at);
  // The same for one page further down, which he has not published: somebody else has, or not.
  Cursor pass(Cursor at, std::span<const Token> tokens);

  // References to the pages that a look just found; a look that is older than `version` is void.
  // In the table the groups take turns: page by page, and group by group within one.
  // True if a session (0: none) comes back with it to a branch that it had left.
  bool hold(const Found& found, PageTable& table, std::uint64_t session);

  // The right to publish `tokens` one step down: nobody has. Valid until something is published.
  class Vacancy {
    friend class PrefixIndex;
    Vacancy(std::uint64_t key, NodeId there) noexcept : key_(key), there_(there) {}
    std::uint64_t key_;
    NodeId there_;  // the node of this content, if the host has it; or -1
  };
  std::optional<Vacancy> vacancy(Cursor at, std::span<const Token> tokens) const;

  // Take in a computed page whose content is not there yet; the cursor steps down to it. A request
  // that holds a node holds all above it, so whatever nobody holds can be evicted, leaf by leaf.
  SharedPage publish(Cursor& at, std::span<const Token> tokens, Vacancy vacancy,
                     ExclusivePage&& page);

  // Who gives a path back opens a tail, gives the last page back first, and closes the tail: what
  // nobody else holds is in it. -1: that is nothing. What a tail is, the caller says
  // (retention.hpp).
  TailId open_tail(std::uint64_t session, bool revisits) {
    last_given_back_ = -1;
    return retention_.open(session, revisits);
  }
  // With gaps also of no tail, -1: then it makes one alone, as of a stranger.
  void release(SharedPage&& page, TailId tail);
  TailId close_tail(TailId tail);

  // Of the pages that nobody holds and nothing hangs from, the one that goes first.
  std::optional<PageId> next_evictable() const noexcept;
  // The same, with one spared and what is above it; -1 spares none. Of what nobody waits for or
  // has asked to be kept alone, if `unwanted` says so.
  std::optional<PageId> next_evictable_but(NodeId spared, bool unwanted = false);
  // Let such a page go to `pool`; false if it is not one.
  bool evict(PageId page, PagePool& pool);

  // What a copy touches is not evicted, and yet it will be evictable.
  bool none_evictable() const noexcept { return retention_.victim() < 0 && pinned_leaves_ == 0; }
  Retention& retention() noexcept { return retention_; }
  const Retention& retention() const noexcept { return retention_; }
  // Pages that no request holds.
  PageId unheld() const noexcept { return unheld_; }
  // Equal numbers, equal looks.
  std::uint64_t version() const noexcept { return version_; }
  // Equal numbers: no page has come, and none that nobody held has found a holder.
  std::uint64_t gained() const noexcept { return gained_; }

  // --- the second home: asked and told by `HostTier` alone
  NodeId node(PageId page) const noexcept;  // -1: the page is not in the index
  bool is_root(NodeId node) const noexcept { return nodes_[index(node)].parent < 0; }
  NodeId parent(NodeId node) const noexcept { return nodes_[index(node)].parent; }
  PageId page(NodeId node) const noexcept { return nodes_[index(node)].page; }    // -1: none
  HostPage host(NodeId node) const noexcept { return nodes_[index(node)].host; }  // -1: none
  bool host_leaf(NodeId node) const noexcept { return nodes_[index(node)].hosted == 0; }
  std::uint64_t last_used(NodeId node) const noexcept;
  // A copy of the node begins, and ends: what it touches is not evicted, nor the page above it.
  void pin(NodeId node);
  void unpin(NodeId node);
  void move_in(NodeId node, HostPage host);  // a host page is the node's
  void move_out(NodeId node);                // and no longer
  // The page of a node that was on the host alone, held by nobody.
  void appear(NodeId node, ExclusivePage&& page);
  // The pages after those found that the host alone has.
  void beyond(const Found& found, std::span<const Token> tokens, std::size_t most,
              std::string_view salt, std::vector<HostPage>& out) const;

  // A node by name: its memory is used again, its birth is not.
  struct Place {
    NodeId node = -1;
    std::uint64_t born = 0;
  };
  bool there(const Place& place) const noexcept {
    return place.node >= 0 && nodes_[index(place.node)].born == place.born;
  }
  // The end of a path, and pages of it at doubling distances above: so that when leaves are gone,
  // what is left of the path is found again but for as many pages.
  using Trail = std::array<Place, 24>;
  Trail trail(Cursor end) const;
  // The pages of what is left of it that the host alone has, from above.
  std::vector<Place> on_host(const Trail& trail) const;
  // What the tail of a page that nobody holds is from now on, and its name.
  Retention::Name keep(NodeId node, Kind as, Microseconds until);

  // For checks: references that the index counts for a node, and its page.
  std::int32_t references(NodeId node) const { return nodes_[index(node)].references; }
  std::vector<std::pair<NodeId, PageId>> pages() const;
  std::vector<Token> key(NodeId node) const;  // the tokens of its page and of all above
  std::string_view salt(NodeId node) const;   // of the root above it
  bool tails_right() const;  // every page that nobody holds is in a tail, and no other one

 private:
  struct Node {
    NodeId parent = -1;
    PageId page = -1;             // -1: a root, or not on the device, or spare
    HostPage host = -1;           // -1: not on the host
    std::int32_t references = 0;  // requests; of a root, those that may publish below it
    std::int32_t children = 0;    // on the device
    std::int32_t hosted = 0;      // children on the host
    std::int32_t below = 0;       // children wherever they are
    std::int32_t stays = 0;       // of those who go on from here
    std::int32_t memory = -1;     // of its tokens, where neither device nor host has them
    std::int32_t pins = 0;        // copies of it, and of what is right below it
    bool pinned_leaf = false;     // counted as one
    std::uint8_t group = 0;       // of a root
    NodeId next = -1;             // with the same bucket
    TailId tail = -1;             // that it is of, while nobody holds it
    NodeId goes_before = -1;      // with gaps: of its tail, the one that was given back before it
    NodeId goes_after = -1;       // and the one after it
    std::uint64_t used = 0;       // when it was given back last
    std::uint64_t hash = 0;
    std::uint64_t born = 0;   // a node's memory is used again, this number is not
    std::uint64_t watch = 0;  // the last one that it was on the path of
  };
  static std::size_t index(NodeId node) noexcept { return static_cast<std::size_t>(node); }

  Cursor find_root(std::string_view salt, std::size_t group) const;
  Token* row(PageId page) noexcept { return page_tokens_.get() + index(page) * index(page_size_); }
  std::span<const Token> tokens(NodeId node) const noexcept;
  Found look_through(std::string_view salt, std::span<const Token> tokens, std::size_t most) const;
  Found with_held(Found found) const noexcept;
  void remember(NodeId node, std::span<const Token> tokens);
  void touch(const Node& node) noexcept { touched_ += node.watch == watch_ ? 1 : 0; }
  void evict_anywhere(NodeId node, PagePool& pool);
  void let_go(NodeId node, TailId tail);
  NodeId leave_tail(Node& node) noexcept;
  std::uint64_t hash(NodeId parent, std::span<const Token> tokens) const noexcept;
  NodeId find(NodeId parent, std::uint64_t key, std::span<const Token> wanted) const noexcept;
  NodeId make();
  NodeId make(NodeId parent, std::uint64_t key);
  void unchain(NodeId id) noexcept;
  void forget_if_nowhere(NodeId id);
  void drop_root_if_unused(NodeId root);
  bool leaf(const Node& node) const noexcept {
    return node.references == 0 && node.page >= 0 && (node.children == 0 || gaps_);
  }
  bool can_go(const Node& node) const noexcept { return leaf(node) && node.pins == 0; }
  void settle(NodeId id);

  std::int32_t page_size_;
  std::vector<CacheGroup> groups_;
  bool gaps_;  // may be in a path: it slides, or has several groups
  PageId pages_;
  PageId unheld_ = 0;
  PageId pinned_leaves_ = 0;  // evictable but for a copy that touches them
  std::uint64_t uses_ = 0;
  Retention retention_;
  std::uint64_t version_ = 0;
  std::uint64_t gained_ = 0;
  std::uint64_t births_ = 0;
  std::uint64_t watch_ = 1;     // there is one at a time
  bool watches_roots_ = false;  // of its salt one is not there yet
  std::uint64_t touched_ = 0;
  mutable std::uint64_t looks_ = 0;
  std::vector<Node> nodes_;
  std::unique_ptr<Token[]> page_tokens_;  // of device pages, then of host pages
  std::vector<Token> memories_;           // of nodes that are remembered, a page each
  std::vector<std::int32_t> spare_memories_;
  std::vector<NodeId> nodes_by_page_;
  std::vector<NodeId> spare_;
  std::vector<NodeId> buckets_;  // by hash: the first of a chain; as many as a power of two
  std::vector<NodeId> path_;     // of the hold being made
  NodeId last_given_back_ = -1;  // of the open tail
  std::vector<std::unordered_map<std::string, NodeId>> roots_;  // by group
  std::unordered_map<NodeId, std::string> salts_;
};

}  // namespace tokenspeed
