// What a window changes: specs/Window.tla. Rule: a page goes as soon as nothing to come, and no
// step in flight, sees any of it; a hole stays in its place.
#include <algorithm>
#include <variant>

#include "control.hpp"

namespace tokenspeed {

std::int32_t Control::pages_needed(std::int32_t tokens) const noexcept {
  const std::int32_t whole = pages_for(tokens, config_.page_size);
  return config_.group.window > 0 ? std::min(whole, pages_within(config_.group.window)) : whole;
}

// That as many tokens in a row may lie in.
std::int32_t Control::pages_within(std::int32_t tokens) const noexcept {
  return tokens == 1 ? 1 : (tokens - 2) / config_.page_size + 2;
}

// A window, and what is planned beyond what is computed; where the pool is smaller, less is
// planned.
std::int32_t Control::pages_at_once(std::int32_t tokens) const noexcept {
  const std::int32_t whole = pages_for(tokens, config_.page_size);
  if (config_.group.window == 0) return whole;
  const std::int64_t span =
      config_.group.window + std::int64_t{config_.chunk} * config_.in_flight_max;
  if (span >= tokens) return std::min(whole, config_.pages);
  return std::min({whole, pages_within(static_cast<std::int32_t>(span)), config_.pages});
}

// Steps complete in order, so no query to come is before `done`: what that one does not see, nobody
// will. A page that was never published leaves the place below it in the index to go on from.
bool Control::slide(RequestIndex index) {
  return with(index, [&]<State S>() -> bool {
    if constexpr (lifecycle::can(lifecycle::Action::Schedule, S)) {
      Record& record = records_[index];
      if (record.slid >= std::min(record.pages, index_.pages_behind(record.done))) return false;
      const std::int32_t at = record.slid++;
      PageTable& pages = handle<S>(index).pages();
      if (recording_) trace_.push_back({"Slide", record.number, pages.id(index_of(at)), -1, {}});
      auto entry = pages.leave_hole(index_of(at));
      if (auto* own = std::get_if<ExclusivePage>(&entry)) pool_.give_back(std::move(*own));
      if (auto* shared = std::get_if<SharedPage>(&entry)) index_.release(std::move(*shared), -1);
      if (record.published == at) pass(record);
      recount(index);
      return true;
    } else {
      return false;
    }
  });
}

void Control::pass(Record& record) {
  const std::size_t size = index_of(config_.page_size);
  const auto tokens = std::span(record.tokens).subspan(index_of(record.published) * size, size);
  if (config_.prefix_cache) record.cursor = index_.pass(record.cursor, tokens);
  ++record.published;
}

}  // namespace tokenspeed
