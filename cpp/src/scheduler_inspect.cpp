// Looking into the scheduler: gauges, and who holds what recomputed from scratch.
#include "scheduler.hpp"

namespace tokenspeed {

using lifecycle::Action;

Stats Scheduler::stats() const noexcept {
  Stats out = counts_;
  out.running = std::ssize(running_);
  out.waiting = std::ssize(queued_);
  out.draining = std::ssize(by_number_) - out.running - out.waiting;
  out.pages_total = pool_.total();
  out.pages_free = pool_.free();
  out.pages_cached = index_.unheld();
  return out;
}

bool Scheduler::idle() const noexcept {
  return by_number_.empty() && launched_.empty();
}

const std::vector<Token>* Scheduler::tokens(std::int64_t number) const {
  const auto found = by_number_.find(number);
  return found == by_number_.end() ? nullptr : &records_[found->second].tokens;
}

std::int64_t Scheduler::transitions(Action action, State from, State to) const noexcept {
  const auto row = static_cast<std::size_t>(action) * kStates + static_cast<std::size_t>(from);
  return transitions_[row * kStates + static_cast<std::size_t>(to)];
}

std::vector<std::string> Scheduler::check() const {
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
  const auto look = [&](const auto& requests) {
    for (const auto& request : requests) {
      for (std::size_t at = 0; at < request.pages().size(); ++at) {
        const auto& entry = request.pages()[at];
        if (const auto* own = std::get_if<ExclusivePage>(&entry)) hold(own->id(), "a request");
        if (const auto* shared = std::get_if<SharedPage>(&entry)) ++references[shared->node()];
      }
    }
  };
  look(std::get<Shelf<State::Prefilling>>(shelves_).requests);
  look(std::get<Shelf<State::Decoding>>(shelves_).requests);
  look(std::get<Shelf<State::Finishing>>(shelves_).requests);
  look(std::get<Shelf<State::Aborting>>(shelves_).requests);
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
  if (unheld != index_.unheld()) wrong.push_back("the count of cached pages is off");
  return wrong;
}

}  // namespace tokenspeed
