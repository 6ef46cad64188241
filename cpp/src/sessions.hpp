// Who comes back: the sessions that requests name. Rule: a session is a hint and nothing more; it
// says what the tails of its turns are. So many are remembered, then the one that was idle longest
// is forgotten.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <list>
#include <string>
#include <string_view>
#include <unordered_map>

#include "prefix_index.hpp"
#include "retention.hpp"

namespace tokenspeed {

struct Session {
  std::string name;
  std::uint64_t id = 0;      // never used again
  std::int32_t live = 0;     // turns that wait or run
  bool ended = false;        // no next turn will come
  Retention::Name tail;      // of the last turn
  PrefixIndex::Trail trail;  // of the same, wherever its pages are
  Microseconds since = 0;    // it is idle
  bool awaits_tool = false;  // what comes next is a tool's result, not a person's answer
  Kind as = kind::kTurn;     // what its last turn was
  // How long the last turns let wait for the next, apart for people and for tools.
  struct Gaps {
    std::array<Microseconds, 8> last{};
    std::size_t count = 0;
  };
  std::array<Gaps, 2> gaps;
  Gaps& pace() noexcept { return gaps[awaits_tool ? 1 : 0]; }
};

class Sessions final {
 public:
  Sessions(Retention& retention, std::size_t sessions_max)
      : retention_(retention), idle_max_(sessions_max) {}

  // A turn of a session comes; null if the name is empty.
  Session* arrive(std::string_view name);
  // It has taken what it found of the last one's pages; the rest is a branch that is left, or,
  // if it supersedes the last one, nothing that anybody will want.
  void took(Session& session, bool supersedes);
  // It gives its pages up and waits for new ones.
  void wait(Session* session, TailId tail);
  // It ends, and leaves a tail, or -1.
  void end(Session* session, TailId tail, Microseconds keep_us, bool awaits_tool);
  // No next turn will come: what is cached of the last one goes first. False if it is unknown.
  bool forget(std::string_view name);

  // Null if it is unknown.
  Session* find(std::string_view name);
  std::size_t size() const noexcept { return by_name_.size(); }

 private:
  void replace(Session& session, TailId tail);
  void leave(Session& session, Microseconds keep_us);
  void place(const Session& session, Kind as, Microseconds keep_until = 0);
  void erase(Session& session);
  static Kind kind_of(Session& session) noexcept;

  Retention& retention_;
  std::size_t idle_max_;
  std::uint64_t births_ = 0;
  std::list<Session> live_;
  std::list<Session> idle_;  // the longest idle first
  std::unordered_map<std::string_view, std::list<Session>::iterator> by_name_;
};

}  // namespace tokenspeed
