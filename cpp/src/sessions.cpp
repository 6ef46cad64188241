#include "sessions.hpp"

#include <algorithm>
#include <bit>

namespace tokenspeed {

// --- turns -------------------------------------------------------------------------------------

Session* Sessions::arrive(std::string_view name) {
  if (name.empty()) return nullptr;
  const auto known = by_name_.find(name);
  if (known == by_name_.end()) {
    Session& fresh = live_.emplace_back();
    fresh.name = name;
    fresh.id = ++births_;
    fresh.live = 1;
    by_name_.emplace(fresh.name, std::prev(live_.end()));
    return &fresh;
  }
  Session& session = *known->second;
  session.ended = false;
  if (session.live++ > 0) return &session;
  const Microseconds gap = retention_.now() - session.since;
  retention_.model().returned(session.as, gap);
  Session::Gaps& pace = session.pace();
  pace.last[pace.count++ % pace.last.size()] = gap;
  place(session, kind::kAwaited);
  live_.splice(live_.end(), idle_, known->second);
  return &session;
}

void Sessions::took(Session& session, bool supersedes) {
  if (supersedes) {
    place(session, kind::kForgotten);
    session.tail = {};
  } else {
    replace(session, -1);
  }
}

void Sessions::wait(Session* session, TailId tail) {
  if (session == nullptr) {
    if (tail >= 0) retention_.place(tail, kind::kStranger);
    return;
  }
  replace(*session, tail);
  place(*session, kind::kAwaited);
}

void Sessions::end(Session* session, TailId tail, Microseconds keep_us, bool awaits_tool) {
  if (session == nullptr) {
    if (tail >= 0) retention_.place(tail, kind::kStranger);
    return;
  }
  if (tail >= 0) replace(*session, tail);
  session->awaits_tool = awaits_tool;
  leave(*session, keep_us);
}

// The last turn's tail is this one; what there was before it is a branch that is left.
void Sessions::replace(Session& session, TailId tail) {
  if (retention_.there(session.tail)) {
    const bool again = retention_.revisits(session.tail.tail);
    retention_.place(session.tail.tail, again ? kind::kRevisited : kind::kLeft);
  }
  session.tail = tail >= 0 ? retention_.name(tail) : Retention::Name{};
}

void Sessions::leave(Session& session, Microseconds keep_us) {
  const Microseconds now = retention_.now();
  session.as = kind_of(session);
  place(session, session.as, session.ended ? 0 : now + keep_us);
  if (--session.live > 0) return;
  session.since = now;
  if (session.ended) return erase(session);
  retention_.model().left(session.as);
  idle_.splice(idle_.end(), live_, by_name_.at(session.name));
  if (idle_.size() <= idle_max_) return;
  retention_.model().lost(idle_.front().as, now - idle_.front().since);
  place(idle_.front(), kind::kStranger);
  erase(idle_.front());
}

Session* Sessions::find(std::string_view name) {
  const auto known = by_name_.find(name);
  return known == by_name_.end() ? nullptr : &*known->second;
}

bool Sessions::forget(std::string_view name) {
  const auto known = by_name_.find(name);
  if (known == by_name_.end()) return false;
  Session& session = *known->second;
  session.ended = true;
  if (session.live > 0) return true;
  retention_.model().lost(session.as, retention_.now() - session.since);
  place(session, kind::kForgotten);
  erase(session);
  return true;
}

void Sessions::erase(Session& session) {
  const auto known = by_name_.find(session.name);
  const auto where = known->second;
  by_name_.erase(known);
  (session.live > 0 ? live_ : idle_).erase(where);
}

void Sessions::place(const Session& session, Kind as, Microseconds keep_until) {
  if (!retention_.there(session.tail)) return;
  retention_.place(session.tail.tail, session.ended ? kind::kForgotten : as, keep_until);
}

// By what it waits for and the median of its last gaps, an octave of seconds each; or none is
// known.
Kind Sessions::kind_of(Session& session) noexcept {
  const Kind first = kind::kTurn + (session.awaits_tool ? kind::kPaces : 0);
  auto [gaps, count] = session.pace();
  if (count == 0) return first + kind::kPaces - 1;
  const auto known = static_cast<std::ptrdiff_t>(std::min(count, gaps.size()));
  std::nth_element(gaps.begin(), gaps.begin() + known / 2, gaps.begin() + known);
  const auto seconds =
      static_cast<std::uint64_t>(gaps[static_cast<std::size_t>(known / 2)]) / 1'000'000;
  return static_cast<Kind>(
      first + std::min<int>(static_cast<int>(std::bit_width(seconds)), kind::kPaces - 2));
}

}  // namespace tokenspeed
