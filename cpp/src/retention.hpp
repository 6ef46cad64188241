// Which cached pages go first. Rule: it orders and does nothing else: what it puts last goes all
// the same when nothing else is there, so no hint ever keeps a page from a request that needs it.
//
// What a request leaves behind, and nobody else holds, is a tail: a stretch of one path in the
// prefix index, which is evicted from its end. Tails of a kind lie on a shelf. Only the one that
// was left first is looked at on each, and the one whose pages promise the fewest hits a second
// goes (return_model.hpp).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "return_model.hpp"
#include "tokenspeed/pages.hpp"

namespace tokenspeed {

using TailId = std::int32_t;

// What tails are, in the order of `Retention::victim`.
using Kind = std::uint8_t;
namespace kind {
constexpr Kind kStranger = 0;   // of no session
constexpr Kind kLeft = 1;       // a branch that its session has left for another
constexpr Kind kRevisited = 2;  // such a one that the session had come back to before
constexpr Kind kTurn = 3;    // of a session's last turn, from here on by what that waits for, and
constexpr Kind kPaces = 10;  // by the session's pace
constexpr Kind kLearned = kTurn + 2 * kPaces;  // as many classes has the model
constexpr Kind kForgotten = kLearned;      // of a session that has ended: goes before all others
constexpr Kind kAwaited = kForgotten + 1;  // of a turn that waits in the queue: goes after them
constexpr Kind kKept = kAwaited + 1;       // by its sender's wish: goes last
constexpr std::size_t kCount = kKept + 1;
}  // namespace kind

class Retention final {
 public:
  // At most `kept_max` pages are kept by wish. All memory is reserved here.
  Retention(PageId pages, PageId kept_max);

  // Time comes from outside, and never runs backwards. Wishes that are over lapse.
  void advance(Microseconds now);
  Microseconds now() const noexcept { return now_; }

  // --- the prefix index tells what becomes of pages
  // An empty tail of a session (0: of none); `revisits` says that it came back to a branch.
  TailId open(std::uint64_t session, bool revisits);
  void grow(TailId tail, NodeId node) noexcept;  // upwards: its end comes first
  NodeId close(TailId tail) noexcept;            // its end; -1: it is empty, and gone
  // Somebody takes pages of it, top down; true if its own session comes back to a branch with it.
  bool touch(TailId tail, std::uint64_t session);
  void shrink(TailId tail);  // by one page that is not its end, or the only one
  void end_at(TailId tail, NodeId node) noexcept { at(tail).end = node; }
  void cut(TailId tail, NodeId above);  // its end was evicted; -1: nothing of it is above
  // Nothing hangs from its end, which can be evicted; or something does.
  void may_go(TailId tail);
  void must_stay(TailId tail);
  // The end of the tail that goes first; -1: none may go.
  NodeId victim() const noexcept;
  // Does a turn wait for that one, or has somebody asked to keep it?
  bool victim_is_wanted() const noexcept { return victim() >= 0 && at(next_).as >= kind::kAwaited; }

  // --- sessions tell what a tail is
  // From now on; kept until a time if that is yet to come and the bound allows it.
  void place(TailId tail, Kind as, Microseconds keep_until = 0);
  // A tail's memory is used again, its birth is not: false if the one that was born then is gone.
  struct Name {
    TailId tail = -1;
    std::uint64_t born = 0;
  };
  Name name(TailId tail) const noexcept { return {tail, at(tail).born}; }
  bool there(const Name& name) const noexcept {
    return name.tail >= 0 && at(name.tail).born == name.born;
  }
  bool revisits(TailId tail) const noexcept { return at(tail).revisits; }
  ReturnModel& model() noexcept { return model_; }

  PageId kept() const noexcept { return kept_; }
  // For checks: where a tail on a shelf ends (-1: it lies on none), and whether the pages of all,
  // and of the kept ones, are what they should be.
  NodeId end(TailId tail) const noexcept { return at(tail).shelf_place < 0 ? -1 : at(tail).end; }
  bool right(PageId pages) const noexcept;

 private:
  struct Tail {
    NodeId end = -1;
    PageId pages = 0;
    Kind as = kind::kStranger;
    Kind lapsed = kind::kStranger;  // what a kept one becomes
    bool counted = false;           // the model waits for it
    bool revisits = false;
    std::int32_t shelf_place = -1;
    std::int32_t lapse_place = -1;
    std::uint64_t order = 0;  // of its placing; of a kept one, when it lapses
    Microseconds since = 0;
    std::uint64_t born = 0;  // 0: nothing
    std::uint64_t session = 0;
  };
  // A binary heap, the lowest order first: with each tail's place in it, one is taken out without a
  // search, and nothing is allocated.
  template <std::int32_t Tail::* Place>
  class Heap {
   public:
    void reserve(std::size_t tails) { ids_.reserve(tails); }
    bool empty() const noexcept { return ids_.empty(); }
    TailId front() const noexcept { return ids_.front(); }
    void push(std::vector<Tail>& tails, TailId id);
    void erase(std::vector<Tail>& tails, TailId id) noexcept;

   private:
    void put(std::vector<Tail>& tails, std::size_t place, TailId id) noexcept;
    void sift(std::vector<Tail>& tails, std::size_t place) noexcept;
    std::vector<TailId> ids_;
  };

  Tail& at(TailId tail) noexcept { return tails_[static_cast<std::size_t>(tail)]; }
  const Tail& at(TailId tail) const noexcept { return tails_[static_cast<std::size_t>(tail)]; }
  void classify(TailId tail, Kind as, std::uint64_t order);
  void lose_page(Tail& tail) noexcept;
  void retire(TailId tail) noexcept;
  TailId choose() const noexcept;

  ReturnModel model_{kind::kLearned};
  PageId kept_max_;
  PageId kept_ = 0;
  Microseconds now_ = 0;
  std::uint64_t births_ = 0;
  std::uint64_t placings_ = 0;
  std::vector<Tail> tails_;
  std::vector<TailId> spare_;
  std::array<Heap<&Tail::shelf_place>, kind::kCount> shelves_;
  Heap<&Tail::lapse_place> lapsing_;
  mutable TailId next_ = -1;  // chosen, and nothing has changed since
};

}  // namespace tokenspeed
