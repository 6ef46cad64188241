// Pages for a turn that has not come: specs/features/Sessions.tla. Rule: they come only while
// nobody waits, into pages that nobody is promised, wants or has asked to be kept; and whoever
// comes next finds enough of the others for a step, so that no admission waits for a copy.
#include <algorithm>

#include "scheduler.hpp"

namespace tokenspeed {

Prefetched Scheduler::prefetch(std::string_view name, Microseconds keep_us) {
  if (keep_us < 1 || keep_us > kKeepMax) {
    return {"keep_us: got " + std::to_string(keep_us) + "; expected 1 to " +
            std::to_string(kKeepMax)};
  }
  const Session* session = control_.session(name);
  if (session == nullptr) return {};
  cancel_prefetch(name, false);
  if (session->live > 0) return {{}, true, 0};  // its turn has come
  auto path = control_.index().on_host(session->trail);
  const std::int64_t pages = std::ssize(path);
  if (path.empty()) return {{}, true, 0};
  if (prefetches_.size() == kPrefetchesMax) prefetches_.erase(prefetches_.begin());
  const Microseconds until = control_.retention().now() + keep_us;
  prefetches_.push_back({session->id, until, session->as, session->trail, std::move(path)});
  return {{}, true, pages};
}

bool Scheduler::end_session(std::string_view name) {
  if (!prefetches_.empty()) cancel_prefetch(name, true);
  return control_.end_session(name);
}

// What is under way comes all the same. What has come is like the rest of the last turn again, or
// goes first if nobody will want it.
void Scheduler::cancel_prefetch(std::string_view name, bool forget) {
  const Session* session = control_.session(name);
  if (session == nullptr) return;
  const auto found = std::ranges::find(prefetches_, session->id, &Prefetch::session);
  if (found == prefetches_.end()) return;
  for (const Retention::Name& tail : found->come) {
    if (!control_.retention().there(tail)) continue;
    control_.retention().place(tail.tail, forget ? kind::kForgotten : found->as);
  }
  prefetches_.erase(found);
}

bool Scheduler::prefetching() const noexcept {
  return std::ranges::any_of(prefetches_, [](const Prefetch& each) { return !each.done(); });
}

void Scheduler::prefetch_all(Plan& plan) {
  const Microseconds now = control_.retention().now();
  std::erase_if(prefetches_, [now](const Prefetch& each) { return each.until <= now; });
  if (!control_.queue().empty() || !control_.NoneLacks() || !condemned_.empty()) return;
  for (Prefetch& each : prefetches_) {
    while (!each.done() && prefetch_next(each, plan)) {
    }
  }
}

// One page further; false if it has to wait.
bool Scheduler::prefetch_next(Prefetch& each, Plan& plan) {
  const PrefixIndex& index = control_.index();
  const auto [node, born] = each.path[each.next];
  const NodeId above = index.there({node, born}) ? index.parent(node) : -1;
  if (above < 0) {  // the host has let it go, and what hung from it
    each.next = each.path.size();
    return false;
  }
  const HostPage from = index.host(node);
  if (index.page(node) >= 0 || control_.host()[from].kind == HostTier::Kind::Loading) {
    ++each.next;
    return true;
  }
  const bool hangs = index.is_root(above) || index.page(above) >= 0 ||
                     control_.host()[index.host(above)].kind == HostTier::Kind::Loading;
  if (!hangs) {  // what was there has gone meanwhile
    each.path = index.on_host(each.trail);
    each.next = 0;
    return !each.path.empty();
  }
  const auto page = page_nobody_wants(above);
  if (!page || !control_.load_start(from, *page)) return false;
  const std::int64_t ticket = control_.host()[from].ticket;
  plan.loads.insert(plan.loads.end(), {ticket, *page, from});
  each.tickets.push_back(ticket);
  ++each.next;
  return true;
}

// Free, or of a cached page that neither a turn waits for nor somebody asked to be kept, and not
// one of those that the next step may take.
std::optional<PageId> Scheduler::page_nobody_wants(NodeId above) {
  const std::int64_t there = control_.pool().free() + control_.index().unheld();
  const std::int32_t step = pages_for(config_.step_tokens, config_.page_size);
  if (there - control_.promised() <= step) return std::nullopt;
  while (control_.pool().free() == 0) {
    const auto first = control_.next_evictable_but(above, true);
    if (!first) return std::nullopt;
    control_.evict(*first);
    ++counts_.evictions;
  }
  return control_.pool().next();
}

void Scheduler::prefetched(std::int64_t ticket, NodeId node) {
  for (Prefetch& each : prefetches_) {
    const auto found = std::ranges::find(each.tickets, ticket);
    if (found == each.tickets.end()) continue;
    each.tickets.erase(found);
    ++counts_.prefetches;
    if (control_.index().page(node) < 0) return;
    each.come.push_back(control_.keep(node, each.as, each.until));
    return;
  }
}

}  // namespace tokenspeed
