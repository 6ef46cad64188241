// When pages go to the second home and come back. Rule: best effort. What cannot be stored is not,
// what cannot be loaded is computed, and neither keeps a request that fits from being let in: its
// loads are waited for once, then it goes on with what has come.
#include <algorithm>
#include <array>
#include <utility>

#include "scheduler.hpp"

namespace tokenspeed {

// --- to the host -------------------------------------------------------------------------------

// All that is computed, and each page of it stored when the next step is planned.
void Scheduler::publish(RequestIndex index) {
  while (control_.publish(index)) {
    const auto at = static_cast<std::size_t>(control_.record(index).published - 1);
    want_stored(control_.table(index)->id(at));
  }
}

void Scheduler::want_stored(PageId page) {
  if (to_store_.size() < to_store_.capacity()) to_store_.push_back(page);
}

// Of a request that is to give its pages up, what is published.
void Scheduler::want_all_stored(RequestIndex index) {
  if (control_.host().total() == 0) return;
  for (std::int32_t at = 0; at < control_.record(index).published; ++at) {
    want_stored(control_.table(index)->id(static_cast<std::size_t>(at)));
  }
}

// Parents first, as they were published: a page is stored under one that is.
void Scheduler::store(Plan& plan) {
  if (control_.Starved()) return;
  for (const PageId page : to_store_) {
    if (!control_.host().storable(page)) continue;
    const auto block = host_page_for(page);
    if (!block || !control_.store_start(page, *block)) continue;
    const std::int64_t ticket = control_.host()[*block].ticket;
    plan.stores.insert(plan.stores.end(), {ticket, page, *block});
  }
  to_store_.clear();
}

// A free page; else the least recently used one, unless the page would hang from it.
std::optional<HostPage> Scheduler::host_page_for(PageId page) {
  if (const auto free = control_.host().next()) return free;
  const auto oldest = control_.oldest_on_host();
  const PrefixIndex& index = control_.index();
  const NodeId above = index.parent(index.node(page));
  if (!oldest || control_.host()[*oldest].node == above) return std::nullopt;
  control_.host_drop(*oldest);
  return oldest;
}

// --- and back ----------------------------------------------------------------------------------

Scheduler::Fetch* Scheduler::fetch_of(std::int64_t arrival) noexcept {
  const auto found = std::ranges::find(fetches_, arrival, &Fetch::arrival);
  return found == fetches_.end() ? nullptr : &*found;
}

// Are pages under way that this request waits for?
bool Scheduler::fetching(RequestIndex index) noexcept {
  const Fetch* fetch = fetch_of(control_.record(index).arrival);
  if (fetch == nullptr) return false;
  for (std::size_t at = 0; at < fetch->from.size(); ++at) {
    if (control_.host()[fetch->from[at]].ticket == fetch->tickets[at]) return true;
  }
  return false;
}

// Starts loading what a queued request would find on the host; true if something is under way.
// What came ahead of its turn may be gone again by then, so that it is asked for once more.
bool Scheduler::fetch(RequestIndex index, bool as_head, Plan& plan) {
  const std::int64_t arrival = control_.record(index).arrival;
  Fetch* fetch = fetch_of(arrival);
  if (!condemned_.empty() || (fetch != nullptr && (fetch->as_head || !as_head))) return false;
  const std::int32_t pages = control_.cached(index).pages;
  if (fetch == nullptr) fetch = &fetches_.emplace_back(Fetch{arrival, pages, as_head, {}, {}});
  fetch->as_head = as_head;
  fetch->before = std::min(fetch->before, pages);
  fetch->tickets.clear();
  control_.look_further(index, fetch->from);
  for (const HostPage from : fetch->from) {
    if (!start_load(from, plan)) break;
    fetch->tickets.push_back(control_.host()[from].ticket);
  }
  fetch->from.resize(fetch->tickets.size());
  return !fetch->tickets.empty();
}

// For the first in the queue, so that their copies overlap with the steps of others: for as many
// as there would be pages for, together with all who come before them. Costs no look for those who
// have been asked for, nor for those who do not fit.
void Scheduler::fetch_ahead(Plan& plan) {
  std::int64_t pages = 0;
  std::size_t place = 0;
  std::array<std::int64_t, kFetchesMax> first;
  for (const auto& [rank, index] : control_.queue()) {
    pages += lacks(index, 0);
    if (place == first.size() || pages > spare_pages()) break;
    first[place++] = control_.record(index).arrival;
    if (control_.NoneLacks()) fetch(index, false, plan);
  }
  std::erase_if(fetches_,
                [&, end = first.begin() + static_cast<std::ptrdiff_t>(place)](const Fetch& each) {
                  return !each.as_head && std::find(first.begin(), end, each.arrival) == end;
                });
}

bool Scheduler::start_load(HostPage from, Plan& plan) {
  const HostTier::Page& home = control_.host()[from];
  if (home.kind == HostTier::Kind::Loading) return true;  // for one that was here before
  const auto page = page_beside(control_.index().parent(home.node));
  if (!page || !control_.load_start(from, *page)) return false;
  plan.loads.insert(plan.loads.end(), {home.ticket, *page, from});
  return true;
}

// A free page. To have one, cached ones go as ever, but not the one that it will hang from.
std::optional<PageId> Scheduler::page_beside(NodeId above) {
  while (control_.pool().free() == 0) {
    const auto first = control_.next_evictable_but(above);
    if (!first) return std::nullopt;
    control_.evict(*first);
    ++counts_.evictions;
  }
  return control_.pool().next();
}

// --- what became of it -------------------------------------------------------------------------

Acknowledged Scheduler::acknowledge(std::span<const std::int64_t> tickets,
                                    std::span<const std::uint8_t> good) {
  Acknowledged out;
  for (std::size_t at = 0; at < tickets.size(); ++at) {
    const bool known = control_.acknowledge(tickets[at], good[at] != 0);
    ++(known ? out.taken : out.unknown);
    if (known && good[at] == 0) ++counts_.copies_failed;
  }
  counts_.copies_unknown += out.unknown;
  end_copies();
  drop_condemned();
  return out;
}

// Each copy whose turn it is; that one has ended may make it another's.
void Scheduler::end_copies() {
  using Ack = HostTier::Ack;
  const HostTier& host = control_.host();
  bool again = true;
  while (std::exchange(again, false)) {
    for (std::size_t at = 0; at < host.moving().size();) {
      const HostPage block = host.moving()[at];
      const bool acknowledged = host[block].ack != Ack::None;
      if (acknowledged && end_copy(block, host[block].ack == Ack::Good)) {
        again = true;
      } else {
        ++at;
      }
    }
  }
}

bool Scheduler::end_copy(HostPage block, bool good) {
  const bool load = control_.host()[block].kind == HostTier::Kind::Loading;
  const std::int64_t ticket = control_.host()[block].ticket;
  if (!(load ? control_.load_end(block, good) : control_.store_end(block, good))) return false;
  if (good) ++(load ? counts_.loads : counts_.stores);
  if (good && load && !prefetches_.empty()) prefetched(ticket, control_.host()[block].node);
  if (load && !good && std::ranges::find(condemned_, block) == condemned_.end()) {
    condemned_.push_back(block);
  }
  return true;
}

// A page that came back wrong leaves the host, after what hangs from it there; what a copy still
// touches keeps it until the copy has ended.
void Scheduler::drop_condemned() {
  std::erase_if(condemned_, [this](HostPage block) {
    const NodeId node = control_.host()[block].node;
    if (node < 0) return true;
    for (const HostPage each : control_.host().below(node)) control_.host_drop(each);
    return control_.host()[block].kind == HostTier::Kind::Free;
  });
}

}  // namespace tokenspeed
