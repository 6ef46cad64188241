// Looking into the control plane: by number, by request, and who holds what recomputed from
// scratch.
#include <algorithm>

#include "control.hpp"

namespace tokenspeed {

using lifecycle::Action;

std::optional<RequestIndex> Control::find(std::int64_t number) const {
  const auto found = by_number_.find(number);
  return found == by_number_.end() ? std::nullopt : std::optional(found->second);
}

std::int32_t Control::slot(RequestIndex index) const noexcept {
  return lifecycle::visit(records_[index].state, [&]<State S>() -> std::int32_t {
    if constexpr (lifecycle::owns_slot(S)) return handle<S>(index).slot().index();
    return -1;
  });
}

const PageTable* Control::table(RequestIndex index) const noexcept {
  return lifecycle::visit(records_[index].state, [&]<State S>() -> const PageTable* {
    if constexpr (lifecycle::owns_pages(S)) return &handle<S>(index).pages();
    return nullptr;
  });
}

std::int64_t Control::transitions(Action action, State from, State to) const noexcept {
  const auto row = static_cast<std::size_t>(action) * kStates + static_cast<std::size_t>(from);
  return transitions_[row * kStates + static_cast<std::size_t>(to)];
}

Snapshot Control::snapshot() const {
  Snapshot out;
  out.pages.resize(static_cast<std::size_t>(pool_.total()));
  for (const auto& [number, index] : by_number_) {
    Snapshot::Request request{&records_[index], {}};
    if (const PageTable* pages = table(index)) {
      for (std::size_t at = 0; at < pages->size(); ++at) {
        const PageId page = pages->id(at);
        request.table.push_back(page);
        if (pages->exclusive(at)) out.pages[static_cast<std::size_t>(page)].kind = "Exclusive";
      }
    }
    out.requests.push_back(std::move(request));
  }
  std::ranges::sort(out.requests, {}, [](const auto& request) { return request.record->arrival; });
  for (const PageId page : pool_.free_ids())
    out.pages[static_cast<std::size_t>(page)].kind = "Free";
  for (const auto& [node, page] : index_.pages()) {
    out.pages[static_cast<std::size_t>(page)] = {"Shared", index_.references(node),
                                                 index_.key(node), index_.salt(node)};
  }
  for (HostPage block = 0; block < host_.total(); ++block) {
    const HostTier::Page& home = host_[block];
    Snapshot::Page& page = out.host.emplace_back();
    page.kind = name(home.kind);
    if (home.node >= 0) {
      page.key = index_.key(home.node);
      page.salt = index_.salt(home.node);
    }
    if (home.taken) out.pages[static_cast<std::size_t>(home.copied)].kind = "Free";
  }
  for (const HostPage block : host_.moving()) {
    out.moves.push_back({host_[block].copied, block, host_[block].kind == HostTier::Kind::Storing});
  }
  out.plan = plan_;
  for (std::size_t at = 0; at < launched_.size(); ++at) out.inflight.push_back(launched_[at].rows);
  return out;
}

std::map<PageId, Prefix> Control::prefixes() const {
  std::map<PageId, Prefix> out;
  for (const auto& [node, page] : index_.pages()) {
    out[page] = {std::string(index_.salt(node)), index_.key(node)};
  }
  return out;
}

std::map<HostPage, Prefix> Control::host_prefixes() const {
  std::map<HostPage, Prefix> out;
  for (HostPage block = 0; block < host_.total(); ++block) {
    const HostTier::Page& home = host_[block];
    if (home.kind == HostTier::Kind::Free || home.kind == HostTier::Kind::Storing) continue;
    out[block] = {std::string(index_.salt(home.node)), index_.key(home.node)};
  }
  return out;
}

// Each page of the host is free or a node's, and what is there stands on what is there.
void Control::check_host(std::vector<std::string>& wrong) const {
  HostPage present = 0;
  HostPage free = 0;
  for (HostPage block = 0; block < host_.total(); ++block) {
    const HostTier::Page& home = host_[block];
    const std::string which = "host page " + std::to_string(block);
    free += home.kind == HostTier::Kind::Free ? 1 : 0;
    if (home.kind == HostTier::Kind::Free) continue;
    if (index_.host(home.node) != block) wrong.push_back(which + " is not its node's");
    const NodeId above = index_.parent(home.node);
    const bool present_here = home.kind != HostTier::Kind::Storing;
    present += present_here ? 1 : 0;
    if (present_here && !index_.is_root(above) && index_.host(above) < 0) {
      wrong.push_back(which + " stands on nothing");
    }
  }
  if (free != host_.free()) wrong.push_back("the count of free host pages is off");
  if (present != host_.present()) wrong.push_back("the count of cached host pages is off");
}

std::vector<std::string> Control::check() const {
  std::vector<std::string> wrong;
  std::vector<int> holders(static_cast<std::size_t>(pool_.total()), 0);
  std::unordered_map<NodeId, std::int32_t> references;
  const auto hold = [&](PageId page, const char* by) {
    if (holders[static_cast<std::size_t>(page)]++ > 0) {
      wrong.push_back("page " + std::to_string(page) + " is held twice, now by " + by);
    }
  };
  for (const PageId page : pool_.free_ids()) hold(page, "the free list");
  for (const auto& [node, page] : index_.pages()) hold(page, "the prefix index");
  for (const HostPage block : host_.moving()) {
    if (const auto& taken = host_[block].taken) hold(taken->id(), "a load");
  }
  check_host(wrong);
  std::int32_t lacking = 0;
  std::int64_t promised = 0;
  std::vector<std::int32_t> slots = free_slots_;
  for (const auto& [number, index] : by_number_) {
    if (slot(index) >= 0) slots.push_back(slot(index));
    lacking += Lacks({index, records_[index].incarnation}) ? 1 : 0;
    promised += owed(records_[index]);
    const PageTable* pages = table(index);
    for (std::size_t at = 0; pages && at < pages->size(); ++at) {
      const auto& entry = (*pages)[at];
      if (const auto* own = std::get_if<ExclusivePage>(&entry)) hold(own->id(), "a request");
      if (const auto* shared = std::get_if<SharedPage>(&entry)) ++references[shared->node()];
    }
  }
  for (std::size_t page = 0; page < holders.size(); ++page) {
    if (holders[page] == 0) wrong.push_back("page " + std::to_string(page) + " is lost");
  }
  PageId unheld = 0;
  for (const auto& [node, page] : index_.pages()) {
    if (index_.references(node) != references[node]) {
      wrong.push_back("page " + std::to_string(page) + " counts " +
                      std::to_string(index_.references(node)) + " references, has " +
                      std::to_string(references[node]));
    }
    unheld += references[node] == 0 ? 1 : 0;
  }
  if (!index_.tails_right())
    wrong.push_back("a cached page is in no tail, or a count of them is off");
  if (unheld != index_.unheld()) wrong.push_back("the count of cached pages is off");
  std::ranges::sort(slots);
  for (std::int32_t at = 0; at < config_.slots; ++at) {
    if (std::ssize(slots) != config_.slots || slots[static_cast<std::size_t>(at)] != at) {
      wrong.push_back("slot " + std::to_string(at) + " is lost, or held twice");
      break;
    }
  }
  if (promised != promised_) wrong.push_back("the count of promised pages is off");
  if (lacking != lacking_) wrong.push_back("the count of requests that lack a page is off");
  return wrong;
}

}  // namespace tokenspeed
